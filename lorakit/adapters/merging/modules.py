"""The modules of a merge: which one holds a layer's weight, and new ones for merged weights."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from ...layers import AdaptedLayer, AdapterModule, Embedding4bit, Linear4bit, LoRAParameter, ResidualLinear4bit
from ...layers.frozen.calls import is_dense
from ...layers.frozen.quantized_module import QuantizedModule, frozen
from ...layers.frozen.values import bitsandbytes_4bit, is_bitsandbytes, values_of
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


def our_form(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a frozen layer of bitsandbytes as one of lorakit's: in the same 4 bits, or dense for 8 bits.

    Any other module is returned as it is.

    Args:
        dtype: of a weight that was in 8 bits.
    """
    bias = getattr(module, "bias", None)
    form = module
    if (weight := bitsandbytes_4bit(module)) is not None:
        is_table = isinstance(module, nn.Embedding)
        form = Embedding4bit(weight) if is_table else Linear4bit(weight, bias, getattr(module, "compute_dtype", None))
    elif not is_dense(module._parameters.get("weight")) and is_bitsandbytes(module):
        form = dense_linear(cast(Tensor, values_of(module, dtype)), bias)
    return module if form is module else _in_place_of(module, form)


@contextlib.contextmanager
def with_our_form(layer: AdaptedLayer, dtype: torch.dtype) -> Iterator[nn.Module]:
    """Within the context a layer's base is in `our_form`; the result is the base that it had."""
    old = layer.base_layer
    layer.base_layer = our_form(old, dtype) if not isinstance(layer, LoRAParameter) else old
    try:
        yield old
    finally:
        layer.base_layer = old


def weight_bytes(layer: AdaptedLayer) -> int:
    """Return the bytes that a layer's weight takes in memory, a low-rank part beside 4 bits included."""
    base = layer.base_layer
    if (weight := bitsandbytes_4bit(base)) is not None:
        return weight.nbytes
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
    return _in_place_of(old, new)


def _in_place_of(old: nn.Module, new: nn.Module) -> nn.Module:
    """Give a new module the mode and the hooks of the one whose place it takes."""
    for name in _HOOKS:  # the same dictionaries, so that a handle removes its hook from both
        vars(new)[name] = vars(old)[name]
    return new.train(old.training)


# What `nn.Module` keeps of hooks on a forward or backward pass.
_HOOKS = [name for name in vars(nn.Module()) if re.fullmatch(r"_(forward|backward|is_full_backward).*_hooks?\w*", name)]


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
