"""`Linear4bit`: a frozen linear layer that keeps its weight in 4 bits and multiplies by the dequantized values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..errors import ShapeError
from ..quantization import NestedScales, QuantizedWeight


class Linear4bit(nn.Module):
    """A frozen linear layer with a 4-bit weight (QLoRA, arXiv:2305.14314, eq. 5, without the adapter).

        y = x @ dequantize(W).T + bias

    The codes and scales are plain tensors, registered as parameters without gradient, so that they move, save and shard
    like any other; nothing (eval, `.to(dtype)`, saving) changes their bytes.

    Shapes:
        x (..., in_features) -> y (..., out_features), in x's dtype; packed (out_features, in_features / 2) uint8.

    Args:
        weight: the quantized weight, of shape (out_features, in_features).
        bias: (out_features,) or None.

    Raises:
        ShapeError: the weight is not two-dimensional, or x's last dimension is not in_features.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        if len(weight.shape) != 2:
            raise ShapeError(f"Linear4bit needs a weight (out_features, in_features), got shape {tuple(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        self.quant_type, self.block_size, self.source_dtype = weight.quant_type, weight.block_size, weight.dtype
        self.packed = _frozen(weight.packed)
        self.code_values = _frozen(weight.code_values)
        if isinstance(weight.scales, NestedScales):
            self.nested_block_size = weight.scales.block_size
            self.absmax = _frozen(weight.scales.codes)
            self.nested_absmax = _frozen(weight.scales.absmax)
            self.nested_offset = _frozen(weight.scales.offset)
            self.nested_code_values = _frozen(weight.scales.code_values)
        else:
            self.nested_block_size = 0
            self.absmax = _frozen(weight.scales)
        self.bias = None if bias is None else _frozen(bias)

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight as a `QuantizedWeight` that shares this layer's tensors."""
        scales: Tensor | NestedScales = self.absmax
        if self.nested_block_size:
            scales = NestedScales(
                self.absmax, self.nested_absmax, self.nested_offset, self.nested_code_values, self.nested_block_size
            )
        shape = torch.Size((self.out_features, self.in_features))
        return QuantizedWeight(
            self.packed, scales, shape, self.source_dtype, self.quant_type, self.block_size, self.code_values
        )

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the dequantized weight, (out_features, in_features) in `dtype`; a fresh tensor."""
        return self.quantized.dequantize(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ShapeError(f"Linear4bit({self.in_features} -> {self.out_features}) got x of shape {tuple(x.shape)}")
        bias = None if self.bias is None else self.bias.to(x.dtype)
        result: Tensor = _FrozenLinear.apply(x, bias, self)
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear4bit:
        # `.to(torch.bfloat16)` must move the codes and scales but never round them; only the bias is ordinary.
        def keep_bytes(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if tensor is self.bias or moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_bytes, recurse)
        return self

    def extra_repr(self) -> str:
        """Show the layer's geometry when it is printed."""
        scales = "double_quant" if self.nested_block_size else "fp32 scales"
        return f"{self.in_features}, {self.out_features}, {self.quant_type}, block_size={self.block_size}, {scales}"


def dense_weight(base: nn.Linear | Linear4bit, dtype: torch.dtype) -> Tensor:
    """Return a frozen linear layer's weight, (out_features, in_features) in `dtype`, dequantized if it is in 4 bits."""
    return base.dense_weight(dtype) if isinstance(base, Linear4bit) else base.weight.to(dtype)


class _FrozenLinear(torch.autograd.Function):
    """y = x Wᵀ + b and dx = dy W, dequantizing W in each pass instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: Linear4bit) -> Tensor:
        ctx.layer = layer
        return linear(x, layer.dense_weight(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (dy,) = grads
        return dy @ ctx.layer.dense_weight(dy.dtype), None, None


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
