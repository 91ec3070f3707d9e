"""A merged layer gives what the adapted one gave, whatever its class and hooks; otherwise the merge is refused."""

import copy
from typing import Any

import pytest
import torch
from made import adapt, full_snapshot
from tolerances import assert_alike
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from lorakit import merge_adapter, unmerge_adapter
from lorakit.errors import AdapterError
from lorakit.layers import Linear4bit
from lorakit.layers.frozen.residual4bit import ResidualLinear4bit

TERMS = 256  # roundings of a layer with 64 inputs and rank 4, and of its merge
X = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class Scaled(nn.Linear):
    """Another product than that of the weight."""

    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


class ByHand(nn.Linear):
    """The product of the weight, written by hand."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", input, self.weight) + self.bias


class Noisy(nn.Linear):
    """The product of the weight, with noise in training."""

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return y + torch.randn_like(y) if self.training else y


class Named(nn.Linear):
    """A subclass without a forward of its own."""


def model_of(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(48, 8)).requires_grad_(False).eval()


def base(kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    torch.manual_seed(0)
    return kind(64, 48)


def four_bit() -> nn.Module:
    return Linear4bit.from_linear(base())


REFUSED = {
    "scaled": lambda: Scaled(64, 48),
    "parametrized": lambda: parametrize.register_parametrization(base(), "weight", Halved()),
    "weight norm": lambda: parametrizations.weight_norm(base()),
    "spectral norm": lambda: parametrizations.spectral_norm(base()),
    "weight norm of old": lambda: nn.utils.weight_norm(base()),
    "pruned": lambda: prune.random_unstructured(base(), "weight", 0.3),
}


@pytest.mark.parametrize("how", REFUSED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_layers_that_would_compute_something_else_are_refused(how: str) -> None:
    model = model_of(REFUSED[how]())
    adapt(model, target_modules=["0", "2"])
    before, expected = full_snapshot(model), model(X)
    reasons = r"which .*; merged, it would give other numbers|that computes its weight from other parameters"
    with pytest.raises(AdapterError, match=rf"0 is a \w+,? ({reasons})"):
        merge_adapter(model)
    assert full_snapshot(model) == before
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("kind", [Named, ByHand, Noisy])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"variant": "hira"}, {"lora_bias": True}], ids=str)
def test_subclasses_whose_output_is_the_product_are_merged(kind: type[nn.Linear], settings: dict[str, Any]) -> None:
    model = model_of(base(kind))
    adapt(model, target_modules=["0"], **settings)
    expected = model(X)
    merge_adapter(model)
    assert type(model[0]) is kind
    assert_alike(model(X), expected, TERMS)


def test_the_check_leaves_no_trace() -> None:
    model = model_of(base(ByHand)).train()
    adapt(model, target_modules=["0"])
    model[0].base_layer.train(False)
    state = torch.get_rng_state()
    merge_adapter(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model[0].training


# ---- hooks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [base, four_bit])
@pytest.mark.parametrize("quantize", [False, True])
def test_hook_that_adds_goes_on_adding(make: Any, quantize: bool) -> None:
    layer, calls = make(), list[int]()

    def steer(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        calls.append(1)
        return output + 10

    handle = layer.register_forward_hook(steer)
    model = model_of(layer)
    adapt(model, target_modules=["0"])
    expected = model(X)
    merge_adapter(model, quantize=quantize, base=False)
    assert_alike(model(X), expected, 4 * TERMS)
    kinds = {(base, False): nn.Linear, (base, True): nn.Linear, (four_bit, False): nn.Linear}
    assert type(model[0]) is kinds.get((make, quantize), ResidualLinear4bit)
    calls.clear()
    handle.remove()
    model(X)
    unmerge_adapter(model)
    model(X)
    assert not calls


@pytest.mark.parametrize("make", [base, four_bit])
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize(
    "hook",
    [
        lambda module, inputs, output: 2 * output,
        lambda module, inputs, output: output.clamp(-1, 1),
        lambda module, inputs, output: output.relu(),
    ],
)
def test_hook_that_does_more_is_refused(make: Any, quantize: bool, hook: Any) -> None:
    model = model_of(make())
    model[0].register_forward_hook(hook)
    adapt(model, target_modules=["0"])
    before, expected = full_snapshot(model), model(X)
    with pytest.raises(AdapterError, match="0 has hooks that do more than add to its output"):
        merge_adapter(model, quantize=quantize, base=False)
    assert full_snapshot(model) == before
    assert torch.equal(model(X), expected)


def test_hook_that_changes_the_input_is_refused() -> None:
    model = model_of(base())
    model[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    adapt(model, target_modules=["0"])
    with pytest.raises(AdapterError, match="0 has hooks that do more"):
        merge_adapter(model)


def test_hooks_that_only_look_are_kept() -> None:
    model, seen = model_of(four_bit()), list[Tensor]()
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    adapt(model, target_modules=["0"])
    expected = model(X)
    merge_adapter(model)
    seen.clear()
    assert_alike(model(X), expected, TERMS)
    assert len(seen) == 1


def test_patched_forward() -> None:
    dense, quantized = model_of(base()), model_of(four_bit())
    for model in (dense, quantized):
        layer = model[0]
        layer.forward = (lambda inner: lambda x: inner(x) - 5)(layer.forward)
        adapt(model, target_modules=["0"])
    expected = dense(X)
    merge_adapter(dense)
    assert_alike(dense(X), expected, TERMS)
    with pytest.raises(AdapterError, match="0 has a patched forward"):
        merge_adapter(quantized)


# ---- the norms of rows that hold a low-rank part ---------------------------------------------------------------------


def test_dora_on_a_layer_that_keeps_an_earlier_merge_beside_its_codes() -> None:
    model = model_of(four_bit())
    adapt(model, "first", target_modules=["0"])
    merge_adapter(model, "first", quantize=True, base=False, reversible=False)
    assert isinstance(model[0], ResidualLinear4bit)
    dense = copy.deepcopy(model)
    dense[0] = nn.Linear(64, 48)
    dense[0].weight.data, dense[0].bias.data = model[0].dense_weight(torch.float32), model[0].bias.data
    expected = model(X)
    for one in (model, dense):
        torch.manual_seed(0)
        adapt(one, "second", target_modules=["0"], use_dora=True)
    assert_alike(model(X), dense(X), 4 * TERMS)
    assert not torch.allclose(model(X), expected, atol=1e-3)
