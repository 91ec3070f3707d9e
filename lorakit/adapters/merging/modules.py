"""The modules of a merge: which one holds a layer's weight, and new ones for merged weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from ...layers import AdaptedLayer, AdapterModule, Embedding4bit, Linear4bit, LoRAParameter, ResidualLinear4bit
from ...layers.frozen.quantized_module import QuantizedModule, frozen
from ...quantization import QuantizedWeight
from .swaps import Exchange
from .weights import MergedWeight


def holder(layer: AdaptedLayer) -> tuple[nn.Module, str]:
    """Return the module that holds a dense layer's weight, and the parameter's name there."""
    if not isinstance(layer, LoRAParameter):
        return layer.base_layer, "weight"
    module = layer.base_layer
    while isinstance(module, LoRAParameter):
        module = module.base_layer
    return module, layer.parameter


def exchanges_weight(module: AdapterModule, exchange: Exchange) -> bool:
    """Return whether an exchange replaces an adapted layer's weight, which has its own line in the report."""
    return isinstance(module, AdaptedLayer) and exchange.name == holder(module)[1]


def weight_bytes(layer: AdaptedLayer) -> int:
    """Return the bytes that a layer's weight takes in memory, a low-rank part beside 4 bits included."""
    base = layer.base_layer
    if not isinstance(base, QuantizedModule):
        module, name = holder(layer)
        return cast(Tensor, module._parameters[name]).nbytes
    residual = base.residual_up.nbytes + base.residual_down.nbytes if isinstance(base, ResidualLinear4bit) else 0
    return base.quantized.nbytes + residual


@contextlib.contextmanager
def dense_base(layer: AdaptedLayer, weight: Tensor | None) -> Iterator[None]:
    """Within the context a 4-bit layer's base is a dense weight of the same shape; with None the base stays."""
    old = layer.base_layer
    if weight is None or not isinstance(old, QuantizedModule):
        yield
        return
    layer.forget_base()
    is_table = isinstance(old, Embedding4bit)
    layer.base_layer = nn.Embedding.from_pretrained(weight) if is_table else dense_linear(weight, None)
    try:
        yield
    finally:
        layer.base_layer = old
        layer.forget_base()


def new_base(old: nn.Module, merged: MergedWeight) -> nn.Module:
    """Return a module with the merged weight for a 4-bit base; a dense base stays, as it only exchanges its weight."""
    if not isinstance(old, QuantizedModule):
        return old
    weight = merged.weight
    new: nn.Module
    if isinstance(old, Linear4bit):
        new = _new_linear(old, merged)
    elif isinstance(weight, QuantizedWeight):
        new = Embedding4bit(weight, cast(Embedding4bit, old).dtype, old.packed.dtype)
    else:
        new = nn.Embedding.from_pretrained(weight.to(cast(Embedding4bit, old).dtype), freeze=True)
    return new.train(old.training)


def _new_linear(old: Linear4bit, merged: MergedWeight) -> nn.Module:
    weight = merged.weight
    new: nn.Linear | Linear4bit
    if isinstance(weight, Tensor):
        new = dense_linear(weight, old.bias)
    elif merged.residual is None:
        new = Linear4bit(weight, old.bias, old.compute_dtype, old.packed.dtype)
    else:
        factors = merged.residual.up, merged.residual.down
        new = ResidualLinear4bit(weight, *factors, old.bias, old.compute_dtype, old.packed.dtype)
    if old.bias is not None and new.bias is not None and new.bias.dtype == old.bias.dtype:
        new.bias = old.bias  # the same object: it moves with the model, and the old layer has it after unmerging
    return new


def dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a frozen nn.Linear with a weight (out_features, in_features) and, if given, a bias (out_features,)."""
    with torch.random.fork_rng(devices=[]):
        layer = nn.Linear(1, 1, bias=False)  # small, since its own weight is replaced
    layer.out_features, layer.in_features = weight.shape
    layer.weight = frozen(weight)
    if bias is not None:
        layer.bias = frozen(bias.to(weight.dtype))
    return layer
