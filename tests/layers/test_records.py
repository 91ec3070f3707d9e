"""Records of adapters: taken off a module and put on again they are the same objects, whatever kind of module it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.layers import (
    VARIANTS,
    AdapterModule,
    AdapterSpec,
    LoRAEmbedding,
    LoRALinear,
    SavedModule,
    TiedModule,
    TrainedTokens,
)


def lora(variant: str) -> LoRALinear:
    layer = LoRALinear(nn.Linear(6, 5))
    for name, r in (("a", 2), ("b", 3)):
        spec = AdapterSpec(r, 0.5, 0.25, VARIANTS[variant], bias=True, neutral_start=False)
        layer.add(name, spec)
    return layer.eval()


def embedding() -> LoRAEmbedding:
    layer = LoRAEmbedding(nn.Embedding(7, 4))
    for name in ("a", "b"):
        layer.add(name, AdapterSpec(2, 2.0, neutral_start=False))
    return layer


def two(part: Any, *arguments: Any) -> Any:
    for name in ("a", "b"):
        part.add(name, *arguments)
    return part


PARTS: dict[str, Callable[[], AdapterModule]] = {
    **{variant: lambda variant=variant: lora(variant) for variant in VARIANTS},
    "embedding": embedding,
    "copy": lambda: two(SavedModule(nn.Linear(6, 5))),
    "tokens": lambda: two(TrainedTokens(nn.Embedding(7, 6)), [1, 3]),
    "head": lambda: two(TiedModule(nn.Linear(6, 7)), {"weight": (TrainedTokens(nn.Embedding(7, 6)), "weight")}),
}


@pytest.mark.parametrize("kind", PARTS)
def test_what_comes_off_can_be_put_on_again(kind: str) -> None:
    part = PARTS[kind]()
    part.active = ("a", "b")
    before = {key: tensor for key, tensor in part.named_parameters() if not key.startswith("base_layer")}
    trained = part.parameters_of("a")
    record = part.detach("a")
    assert part.names() == ["b"] and part.active == ("b",)
    own = [key for key, _ in part.named_parameters() if not key.startswith("base_layer")]
    assert all(".a" not in key for key in own) and len(own) < len(before) + (kind == "head")
    part.attach("a", record)
    assert part.names() == ["b", "a"] and part.parameters_of("a").keys() == trained.keys()
    assert all(part.parameters_of("a")[key] is parameter for key, parameter in trained.items())
    after = {key: tensor for key, tensor in part.named_parameters() if not key.startswith("base_layer")}
    assert after.keys() == before.keys() and all(after[key] is tensor for key, tensor in before.items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_record_goes_to_another_layer_with_all_that_it_means(variant: str) -> None:
    layer, other = lora(variant), LoRALinear(nn.Linear(6, 5)).eval()
    other.load_state_dict({key: tensor for key, tensor in layer.state_dict().items() if "base_layer" in key})
    layer.active, x = ("a",), torch.randn(3, 6)
    expected = layer(x)
    other.attach("c", layer.detach("a"))
    other.active = ("c",)
    assert torch.equal(other(x), expected) and other.scaling["c"] == 0.5 and other.adapters["c"].dropout_p == 0.25


def test_a_record_follows_what_stands_in_the_tables() -> None:
    """Hooks, sharding and `functional_call` put other tensors there."""
    layer = lora("dora")
    record = layer.adapters["a"]
    layer.lora_A["a"] = nn.Parameter(torch.zeros(2, 6))
    assert record.lora_A is layer.lora_A["a"]
    layer.scaling["a"] *= 2
    assert record.scaling == 1.0 and dict(layer.scaling) == {"a": 1.0, "b": 0.5}
    twin = copy.deepcopy(layer)
    assert twin.adapters["a"].lora_A is twin.lora_A["a"] and twin.adapters["a"].lora_A is not record.lora_A
    assert set(record.parameters) == {"lora_A", "lora_B", "lora_magnitude_vector", "trained_bias"}


def test_another_base_weight_gives_another_gain() -> None:
    layer, x = lora("dora"), torch.randn(3, 6)
    layer.active = ("a",)
    with torch.no_grad():
        first = layer(x)
        layer.base_layer.weight.mul_(2)
        layer.forget_base()
        assert not torch.equal(layer(x), first) and not torch.allclose(layer.gain("a", x.dtype), torch.ones(5))
        fresh = copy.deepcopy(layer)
        fresh.forget_base()
        assert torch.equal(fresh(x), layer(x))


@pytest.mark.parametrize("change", ["cast", "load", "load and assign"])
def test_a_model_that_is_cast_or_loaded_has_the_gain_of_its_new_base_weight(change: str) -> None:
    model = nn.Sequential(lora("dora"))
    with torch.no_grad():
        before = model[0].gain("a", torch.float32)
        if change == "cast":
            model.to(torch.bfloat16)
        else:
            state = {key: 3 * tensor if "base" in key else tensor for key, tensor in model.state_dict().items()}
            model.load_state_dict(state, assign=change == "load and assign")
        fresh = copy.deepcopy(model[0])
        fresh.forget_base()
        dtype = fresh.base_layer.weight.dtype
        assert torch.equal(model[0].gain("a", dtype), fresh.gain("a", dtype))
        assert not torch.equal(model[0].gain("a", dtype), before)
