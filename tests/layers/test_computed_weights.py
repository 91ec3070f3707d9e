"""Base layers whose weight is computed in each pass: parametrized, normalized and pruned ones."""

import pytest
import torch
from made import added, one_layer
from tolerances import assert_alike
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from lorakit import LoraConfig, add_adapter, disable_adapters
from lorakit.errors import AdapterError

TERMS = 64  # roundings of a layer with 16 inputs and rank 3
X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(16, 8)


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


COMPUTED = {
    "parametrization": lambda base: parametrize.register_parametrization(base, "weight", Halved()),
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "weight norm of old": nn.utils.weight_norm,
    "pruning": lambda base: prune.l1_unstructured(base, "weight", 0.5),
}


@pytest.mark.parametrize("how", COMPUTED)
@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_computed_weight(how: str, is_late: bool) -> None:
    base = linear().eval()
    if not is_late:
        COMPUTED[how](base)
    model = one_layer(base)
    if is_late:
        COMPUTED[how](base)
    with disable_adapters(model):
        alone = model(X)
    assert_alike(alone, nn.functional.linear(X, base.weight, base.bias), TERMS)  # type: ignore[arg-type]
    assert_alike(model(X), alone + added(model, X), TERMS)


@pytest.mark.parametrize("how", COMPUTED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_computed_weight_has_no_values_of_its_own(how: str) -> None:
    model = nn.Sequential(linear())
    COMPUTED[how](model[0])
    with pytest.raises(AdapterError, match="which computes its weight anew in each pass"):
        add_adapter(model, LoraConfig(r=3, target_modules=["0"], use_dora=True))
