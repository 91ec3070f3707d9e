"""`Linear4bit`: a frozen linear layer that keeps its weight in 4 bits and multiplies by the dequantized values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lorakit_kernels as kernels
import torch
from lorakit_kernels import is_transformed
from torch import Tensor, nn
from torch.nn.functional import linear

from ...errors import ShapeError
from ...quantization import QuantizedWeight, quantize
from .quantized_module import QuantizedModule, frozen


class Linear4bit(QuantizedModule):
    """A frozen linear layer with a 4-bit weight (QLoRA, arXiv:2305.14314, eq. 5, without the adapter).

        y = x @ dequantize(W).T + bias

    Shapes:
        x (..., in_features) -> y (..., out_features), in x's dtype; packed (out_features, in_features / 2) uint8.

    Args:
        weight: the quantized weight, of shape (out_features, in_features).
        bias: (out_features,) or None.
        compute_dtype: dtype of the product; None: x's dtype.
        storage_dtype: dtype of the packed bytes: uint8, or a float dtype for FSDP1, which can shard no other.

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
        """Quantize a dense layer, which stays unchanged. The bias is copied.

        Raises:
            ShapeError, ConfigError: as `lorakit.quantize`.
        """
        weight = quantize(dense.weight, quant_type, block_size, double_quant)
        bias = None if dense.bias is None else dense.bias.detach().clone()
        return Linear4bit(weight, bias, compute_dtype, storage_dtype)

    def add_residual(self, y: Tensor, x: Tensor) -> Tensor:
        """Add to y = x Wᵀ, in place, the product of x with the weight's part outside its codes; there is none here.

        Shapes:
            y (..., out_features), x (..., in_features)
        """
        return y

    def add_residual_dx(self, dx: Tensor, dy: Tensor) -> Tensor:
        """Add to dx = dy W the product of dy with the weight's part outside its codes; there is none here.

        This overwrites dx, unless autograd follows it.

        Shapes:
            dx (..., in_features), dy (..., out_features)
        """
        return dx

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ShapeError(f"Linear4bit({self.in_features} -> {self.out_features}) got x of shape {tuple(x.shape)}")
        input_dtype = x.dtype
        x = x if self.compute_dtype is None else x.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        is_differentiated = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        if is_transformed():
            y: Tensor = linear(x, self.dense_weight(x.dtype), bias)
            return y.to(input_dtype)
        # torch.compile (2.13) fails on the function because its weight is not an argument. The operation has the same
        # gradients.
        if is_differentiated and not torch.compiler.is_compiling():
            y = _FrozenLinear.apply(x, bias, self)
        else:
            y = frozen_linear(self, x, bias)
        return y.to(input_dtype)


class _FrozenLinear(torch.autograd.Function):
    """y = x Wᵀ + b and dx = dy W, from the codes in each pass. Saves no tensor: the layer holds the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: Linear4bit) -> Tensor:
        ctx.layer = layer
        return frozen_linear(layer, x, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (dy,) = grads
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None  # the bias may be trained
        return frozen_linear_dx(ctx.layer, dy), dbias, None


# ---- products with a frozen weight, dense or in 4 bits, for functions with gradients by hand -------------------------


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is GPT-2's "Conv1D", a linear layer whose weight is (in_features, out_features)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and not isinstance(module, nn.Conv1d)


def _dense(base: nn.Linear, dtype: torch.dtype) -> Tensor:
    weight = base.weight.to(dtype)
    return weight if isinstance(base, nn.Linear) else weight.T


def frozen_linear(
    base: nn.Linear | Linear4bit, x: Tensor, bias: Tensor | None, lora: Sequence[Tensor] = (), scaling: float = 1.0
) -> Tensor:
    """Return y = x Wᵀ + bias + scaling u Bᵀ.

    Shapes:
        x (..., in_features) -> (..., out_features), all of x's dtype; with lora (tokens, out_features)
        lora: nothing, or u (tokens, r) and B (out_features, r)
    """
    if isinstance(base, Linear4bit):
        x = x.reshape(-1, x.shape[-1]) if lora else x
        return base.add_residual(kernels.linear_4bit(x, base.operand, bias, lora, scaling), x)
    y = linear(x, _dense(base, x.dtype), bias)
    return torch.addmm(y.reshape(-1, y.shape[-1]), lora[0], lora[1].T, alpha=scaling) if lora else y


def frozen_linear_dx(base: nn.Linear | Linear4bit, dy: Tensor, lora: Sequence[Tensor] = ()) -> Tensor:
    """Return dx = dy W + t A.

    Shapes:
        dy (..., out_features) -> (..., in_features), all of dy's dtype
        lora: nothing, or t (tokens, r) and A (r, in_features), where dy is (tokens, out_features)
    """
    if isinstance(base, Linear4bit):
        return base.add_residual_dx(kernels.linear_4bit_dx(dy, base.operand, lora), dy)
    dx = dy @ _dense(base, dy.dtype)
    return torch.addmm(dx, lora[0], lora[1]) if lora else dx


def add_frozen_linear_dx(dx: Tensor, base: nn.Linear | Linear4bit, dy: Tensor) -> Tensor:
    """Return dx + dy W, for layers that read the same x: dy (tokens, out_features), dx (tokens, in_features).

    It overwrites dx, unless autograd follows it for second derivatives.
    """
    if torch.is_grad_enabled():
        return dx + frozen_linear_dx(base, dy)
    if not isinstance(base, Linear4bit):
        return dx.addmm_(dy, _dense(base, dy.dtype))
    kernels.add_linear_4bit_dx(dx, dy, base.operand)
    return base.add_residual_dx(dx, dy)
