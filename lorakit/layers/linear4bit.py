"""`Linear4bit`: a frozen linear layer that keeps its weight in 4 bits and multiplies by the dequantized values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..errors import ShapeError
from ..quantization import QuantizedWeight, quantize
from .quantized_module import QuantizedModule, frozen
from .workspace import workspace


class Linear4bit(QuantizedModule):
    """A frozen linear layer with a 4-bit weight (QLoRA, arXiv:2305.14314, eq. 5, without the adapter).

        y = x @ dequantize(W).T + bias

    Shapes:
        x (..., in_features) -> y (..., out_features), in x's dtype; packed (out_features, in_features / 2) uint8.

    Args:
        weight: the quantized weight, of shape (out_features, in_features).
        bias: (out_features,) or None.
        compute_dtype: dtype of the product; None: that of x.
        storage_dtype: dtype that the packed bytes are held as: uint8, or a float dtype, as FSDP1 can shard no other.

    Raises:
        ShapeError: the weight is not two-dimensional, or x's last dimension is not in_features.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
        storage_dtype: torch.dtype = torch.uint8,
    ) -> None:
        super().__init__(weight, storage_dtype)
        self.out_features, self.in_features = weight.shape
        self.compute_dtype = compute_dtype
        self.bias = None if bias is None else frozen(bias)

    @staticmethod
    def from_linear(
        dense: nn.Linear,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        storage_dtype: torch.dtype = torch.uint8,
    ) -> Linear4bit:
        """Quantize a dense layer, which is not changed; the bias is copied.

        Raises:
            ShapeError, ConfigError: as `lorakit.quantize`.
        """
        weight = quantize(dense.weight, quant_type, block_size, double_quant)
        bias = None if dense.bias is None else dense.bias.detach().clone()
        return Linear4bit(weight, bias, compute_dtype, storage_dtype)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the dequantized weight, (out_features, in_features) in `dtype`; a fresh tensor."""
        return self.quantized.dequantize(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ShapeError(f"Linear4bit({self.in_features} -> {self.out_features}) got x of shape {tuple(x.shape)}")
        given = x.dtype
        x = x if self.compute_dtype is None else x.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        result: Tensor = _FrozenLinear.apply(x, bias, self)
        return result.to(given)


def product_weight(base: nn.Linear | Linear4bit, dtype: torch.dtype) -> Tensor:
    """Return a frozen linear layer's weight, (out_features, in_features) in `dtype`, for one product.

    Of a 4-bit layer on the CPU it lies in the thread's workspace: the next call overwrites it.
    """
    if not isinstance(base, Linear4bit):
        return base.weight.to(dtype)
    if base.packed.is_cpu and not torch.compiler.is_compiling():  # a compiler plans its own buffers
        return base.quantized.dequantize(out=workspace(base.weight_shape, dtype))
    return base.dense_weight(dtype)


class _FrozenLinear(torch.autograd.Function):
    """y = x Wᵀ + b and dx = dy W, dequantizing W in each pass instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: Linear4bit) -> Tensor:
        ctx.layer = layer
        return linear(x, product_weight(layer, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (dy,) = grads
        bias = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None  # if someone trains the bias
        return dy @ product_weight(ctx.layer, dy.dtype), bias, None
