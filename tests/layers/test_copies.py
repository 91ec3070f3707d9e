"""`SavedModule` and `TiedModule`: what belongs to a copy, and who computes with it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lorakit.errors import AdapterError
from lorakit.layers import AdapterSpec, LoRALinear, SavedModule, TiedModule, TrainedTokens


class TiedInside(nn.Module):
    """Two layers with one weight and one bias, as a head that has its bias twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.first(x))
        return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_keeps_the_ties_within_the_module(dtype: torch.dtype) -> None:
    """In bf16 the fp32 copy is cast for forward, where one name of the tied parameter was not known."""
    module = SavedModule(TiedInside().to(dtype))
    module.add("a", torch.float32)
    module.active = ("a",)
    assert list(module.parameters_of("a")) == ["first.weight", "first.bias"]
    inner = module.copies["a"]
    assert inner.second.weight is inner.first.weight and inner.second.bias is inner.first.bias
    module(torch.randn(3, 4, dtype=dtype)).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters_of("a").values())
    assert set(module.in_file("a")) == {f"{name}.{leaf}" for name in ("first", "second") for leaf in ("weight", "bias")}


def test_running_statistics_belong_to_a_whole_copy() -> None:
    module = SavedModule(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))).train()
    before = {key: buffer.clone() for key, buffer in module.base_layer.named_buffers()}
    for name in ("a", "b"):
        module.add(name)
    module.active = ("a",)
    module(torch.randn(8, 4) + 3)
    assert all(torch.equal(buffer, before[key]) for key, buffer in module.base_layer.named_buffers())
    assert all(torch.equal(buffer, before[key]) for key, buffer in module.buffers_of("b").items())
    assert set(module.buffers_of("a")) == {"0.running_mean", "0.running_var", "0.num_batches_tracked"}
    assert not torch.equal(module.buffers_of("a")["0.running_mean"], before["0.running_mean"])


def test_a_copy_of_the_bias_shares_everything_else() -> None:
    base = nn.Sequential(nn.BatchNorm1d(4))
    base.register_parameter("bias", nn.Parameter(torch.zeros(4)))
    module = SavedModule(base)
    module.add("a", parameters=["bias"])
    assert module.copies["a"][0] is base[0] and module.copies["a"].bias is not base.bias
    assert module.buffers_of("a") == {} and list(module.in_file("a")) == ["bias"]
    norm = SavedModule(nn.BatchNorm1d(4))
    norm.add("a", parameters=["bias"])
    assert norm.copies["a"].running_mean is norm.base_layer.running_mean


def test_a_buffer_that_is_not_saved_is_not_in_files_either() -> None:
    base = nn.Linear(4, 4)
    base.register_buffer("kept", torch.ones(1))
    base.register_buffer("passing", torch.ones(1), persistent=False)
    base.register_buffer("absent", None)
    module = SavedModule(base)
    module.add("a")
    assert list(module.buffers_of("a")) == ["kept"]


class Scaled(nn.Embedding):
    """A subclass that computes otherwise than its parent."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(ids)


@pytest.mark.parametrize("source", ["rows", "copy"])
@pytest.mark.parametrize("follower", [nn.Embedding, Scaled, nn.Linear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_of_any_kind_follows(source: str, follower: type[nn.Module], dtype: torch.dtype) -> None:
    table = nn.Embedding(7, 4, dtype=dtype)
    trains: SavedModule | TrainedTokens = TrainedTokens(table) if source == "rows" else SavedModule(table)
    trains.add("a", *([[1, 3]] if source == "rows" else []), dtype=torch.float32)  # type: ignore[arg-type]
    base = follower(4, 7, bias=False) if follower is nn.Linear else follower(7, 4)  # type: ignore[call-arg]
    base.weight = table.weight  # type: ignore[assignment]
    module, dense = TiedModule(base), copy.deepcopy(base)
    module.add("a", {"weight": (trains, "weight")})
    x = torch.randn(2, 4, dtype=dtype) if follower is nn.Linear else torch.tensor([[1, 2, 3]])
    before = base(x)
    assert torch.equal(module(x), before)
    (parameter,) = trains.parameters_of("a").values()
    parameter.data += torch.randn_like(parameter)
    trains.active = module.active = ("a",)
    dense.weight = nn.Parameter(trains.weight.detach().to(dtype))  # type: ignore[assignment]
    assert torch.equal(module(x), dense(x)) and not torch.equal(module(x), before)
    assert torch.equal(module.weight, dense.weight)  # type: ignore[arg-type]
    module(x).float().sum().backward()
    assert parameter.grad is not None and parameter.grad.any()
    module.detach("a")
    assert torch.equal(module(x), before)


def test_a_layer_of_another_adapter_and_a_followed_weight_have_no_sum() -> None:
    layer, trains = LoRALinear(nn.Linear(4, 7)), TrainedTokens(nn.Embedding(7, 4))
    layer.add("low", AdapterSpec(2, 1.0, neutral_start=False))
    trains.add("rows", [1])
    module = TiedModule(layer)
    module.add("rows", {"weight": (trains, "weight")})
    x = torch.randn(2, 4)
    layer.active = ("low",)
    assert torch.equal(module(x), layer(x))
    module.active = trains.active = ("rows",)
    with pytest.raises(AdapterError, match=r"low, rows change one module .* only one can be active"):
        module(x)
