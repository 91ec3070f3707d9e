"""Products with a 4-bit weight (QLoRA, arXiv:2305.14314, eq. 5), with an adapter's update, bias, and their gradients.

    linear_4bit       y = x Wᵀ + b + s·u Bᵀ     dx = dy W,  db = Σ dy,  du = s·dy B,  dB = s·dyᵀ u
    linear_4bit_dx    dx = dy W + t A           its own gradient multiplies by Wᵀ and Aᵀ, as the forward pass does

W holds the weight's values in x's dtype. All backends accumulate products in fp32. They differ in the order in which
they add, and in whether they round the sum of the products before they add the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..dispatch import differentiate, operation
from ..operands import Weight4bit
from .codec import dequantize_4bit_out


def _empty_result(x: Tensor, weight: Weight4bit, bias: Tensor | None, lora: Sequence[Tensor], scaling: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@operation(fake=_empty_result)
def linear_4bit(
    x: Tensor, weight: Weight4bit, bias: Tensor | None = None, lora: Sequence[Tensor] = (), scaling: float = 1.0
) -> Tensor:
    """Return y = x Wᵀ + bias + scaling u Bᵀ.

    Args:
        x: (..., in_features) fp32, bf16 or fp16.
        weight: (out_features, in_features).
        bias: (out_features,) of x's dtype.
        lora: empty, or an adapter's u = x Aᵀ (..., r) and B (out_features, r), of x's dtype.
        scaling: factor on the adapter's update.

    Returns:
        (..., out_features) of x's dtype.
    """
    return dense_linear(x, _values(weight, x), bias, lora, scaling)


def _empty_gradient(dy: Tensor, weight: Weight4bit, lora: Sequence[Tensor]) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], weight.shape[1])


@operation(fake=_empty_gradient)
def linear_4bit_dx(dy: Tensor, weight: Weight4bit, lora: Sequence[Tensor] = ()) -> Tensor:
    """Return dx = dy W + t A, the gradient of `linear_4bit` with respect to its input.

    Args:
        dy: (..., out_features) fp32, bf16 or fp16.
        weight: (out_features, in_features).
        lora: empty, or an adapter's t = scaling dy B (..., r) and A (r, in_features), of dy's dtype.

    Returns:
        (..., in_features) of dy's dtype.
    """
    return dense_linear_dx(dy, _values(weight, dy), lora)


def _no_result(dx: Tensor, dy: Tensor, weight: Weight4bit) -> None:
    return None


@operation(writes=("dx",), fake=_no_result, by_definition=True)
def add_linear_4bit_dx(dx: Tensor, dy: Tensor, weight: Weight4bit) -> None:
    """Add dy W to dx, for layers that read the same x.

    Args:
        dx: (..., in_features) of dy's dtype, contiguous; overwritten.
        dy: (..., out_features) fp32, bf16 or fp16.
        weight: (out_features, in_features).
    """
    dx += linear_4bit_dx.definition(dy, weight)


def _values(weight: Weight4bit, x: Tensor) -> Tensor:
    """Return the weight's values in x's dtype, on its device."""
    values = torch.empty(list(weight.shape), dtype=x.dtype, device=x.device)
    dequantize_4bit_out.definition(weight, values)
    return values


# ---- the same products with a dense weight -------------------------------------------------------------------------


def dense_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, lora: Sequence[Tensor] = (), scaling: float = 1.0
) -> Tensor:
    """Return `linear_4bit` for a dense weight, (out_features, in_features) of x's dtype."""
    y = linear(x, weight, bias)
    if lora:
        u, lora_b = lora
        y = torch.addmm(_rows(y), _rows(u), lora_b.T, alpha=scaling).view(y.shape)
    return y


def dense_linear_dx(dy: Tensor, weight: Tensor, lora: Sequence[Tensor] = ()) -> Tensor:
    """Return `linear_4bit_dx` for a dense weight, (out_features, in_features) of dy's dtype."""
    dx = dy @ weight
    if lora:
        t, lora_a = lora
        dx = torch.addmm(_rows(dx), _rows(t), lora_a).view(dx.shape)
    return dx


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


# ---- gradients; the weight has none --------------------------------------------------------------------------------


def _save(ctx: Any, weight: Weight4bit, lora: Sequence[Tensor]) -> None:
    ctx.save_for_backward(weight.packed, weight.codebook, weight.absmax, *weight.nested, *lora)
    ctx.block_size, ctx.shape, ctx.nested_block_size = weight.block_size, weight.shape, weight.nested_block_size
    ctx.nested = len(weight.nested)


def _saved(ctx: Any) -> tuple[Weight4bit, Sequence[Tensor]]:
    packed, codebook, absmax, *rest = ctx.saved_tensors
    nested, lora = rest[: ctx.nested], rest[ctx.nested :]
    return Weight4bit(packed, codebook, absmax, ctx.block_size, ctx.shape, nested, ctx.nested_block_size), lora


def _no_gradient(weight: Weight4bit) -> Weight4bit:
    """Return a record with None for each field of a weight and for each tensor in `nested`."""
    nothing: Any = None
    return Weight4bit(nothing, nothing, nothing, nothing, nothing, [nothing] * len(weight.nested), nothing)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *weight, _, lora, ctx.scaling = inputs
    _save(ctx, Weight4bit(*weight), lora)


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    weight, lora = _saved(ctx)
    dx = linear_4bit_dx(dy, weight, []) if ctx.needs_input_grad[0] else None
    bias = _rows(dy).sum(0) if ctx.needs_input_grad[1 + len(weight)] else None
    factors: list[Tensor] = []
    if lora:
        u, lora_b = lora
        factors = [ctx.scaling * (dy @ lora_b), ctx.scaling * (_rows(dy).T @ _rows(u))]
    return dx, *_no_gradient(weight), bias, factors, None


def _save_dx(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *weight, lora = inputs
    _save(ctx, Weight4bit(*weight), lora)


def _dx_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weight, lora = _saved(ctx)
    ddy = linear_4bit(grad, weight, None, [], 1.0)
    factors: list[Tensor] = []
    if lora:
        t, lora_a = lora
        factors = [grad @ lora_a.T, _rows(t).T @ _rows(grad)]
    return ddy, *_no_gradient(weight), factors


differentiate(linear_4bit, _linear_backward, _save_linear)
differentiate(linear_4bit_dx, _dx_backward, _save_dx)
