"""A model family from one definition: an MLP without a gate, under its own names, and a switch under its own key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from made import small_config
from torch import Tensor
from torch.nn.functional import gelu

from lorakit.models.decoder.blocks import MLP
from lorakit.models.decoder.families import Family, GGUFForm


def tanh_gelu(x: Tensor) -> Tensor:
    return gelu(x, approximate="tanh")


class PlainMLP(MLP):
    inputs: ClassVar[tuple[str, ...]] = ("fc1",)
    output: ClassVar[str] = "fc2"
    activation: ClassVar[Callable[..., Tensor]] = staticmethod(tanh_gelu)


def switches(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"qk_norm": bool(values["query_norm"])}


TOY = Family(
    "ToyForCausalLM", "toy", switches, ("gelu_pytorch_tanh",), GGUFForm("llama", permutes_qk=True), mlp=PlainMLP
)

CONFIG = small_config(architectures=["ToyForCausalLM"], hidden_act="gelu_pytorch_tanh", query_norm=True)
