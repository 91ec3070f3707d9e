"""The gradients of the operations, registered with autograd. 4-bit weights and the tables of positions have none.

    linear_4bit       y = x Wᵀ + b + s·u Bᵀ     dx = dy W,  db = Σ dy,  du = s·dy B,  dB = s·dyᵀ u
    linear_4bit_dx    dx = dy W + t A           of it again: W and A applied forward
    rms_norm          y = w·x̂, x̂ = x·rstd       g = w·dy,  dx = rstd·(g − x̂·mean(g·x̂)),  dw = Σ dy·x̂
    rope              a rotation                the rotation by the opposite angle
    swiglu            y = silu(g)·u, σ = σ(g)   du = dy·g·σ,  dg = dy·u·σ·(1 + g·(1 − σ))
    drop              y = m(seed)∘x             dx = m(seed)∘dy

What is saved are the inputs as they came, and rstd; of `drop` the seed. Operations without an entry here (the codec,
the loss with its gradient, the optimizer) are not differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.library import register_autograd

from .dispatch import linear_4bit, linear_4bit_dx, operations
from .training_ops import drop, rms_norm_backward, rope, swiglu_backward


def _register(name: str, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    register_autograd(f"lorakit::{name}", backward, setup_context=setup, lib=operations)


# ---- the 4-bit linear layer ----------------------------------------------------------------------------------------


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, codebook, absmax, ctx.block_size, ctx.shape, nested, ctx.nested_block_size, _, lora, ctx.scaling = inputs
    ctx.save_for_backward(packed, codebook, absmax, *nested, *lora)
    ctx.count = len(nested)


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    packed, codebook, absmax, *rest = ctx.saved_tensors
    nested, lora = rest[: ctx.count], rest[ctx.count :]
    rows = dy.reshape(-1, dy.shape[-1])
    dx = bias = None
    factors: list[Tensor] = []
    if ctx.needs_input_grad[0]:
        weight = packed, codebook, absmax, ctx.block_size, ctx.shape, nested, ctx.nested_block_size
        dx = linear_4bit_dx(dy, *weight, [])
    if ctx.needs_input_grad[8]:
        bias = rows.sum(0)
    if lora:
        u, lora_b = lora
        factors = [ctx.scaling * (dy @ lora_b), ctx.scaling * (rows.T @ u.reshape(-1, u.shape[-1]))]
    return dx, None, None, None, None, None, [None] * ctx.count, None, bias, factors, None


_register("linear_4bit", _linear_backward, _save_linear)


def _save_dx(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, codebook, absmax, ctx.block_size, ctx.shape, nested, ctx.nested_block_size, lora = inputs
    ctx.save_for_backward(packed, codebook, absmax, *nested, *lora)
    ctx.count = len(nested)


def _dx_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    packed, codebook, absmax, *rest = ctx.saved_tensors
    nested, lora = rest[: ctx.count], rest[ctx.count :]
    ddy = linear_4bit(
        grad, packed, codebook, absmax, ctx.block_size, ctx.shape, nested, ctx.nested_block_size, None, [], 1.0
    )
    factors: list[Tensor] = []
    if lora:
        t, lora_a = lora
        factors = [grad @ lora_a.T, t.reshape(-1, t.shape[-1]).T @ grad.reshape(-1, grad.shape[-1])]
    return ddy, None, None, None, None, None, [None] * ctx.count, None, factors


_register("linear_4bit_dx", _dx_backward, _save_dx)


# ---- around it -----------------------------------------------------------------------------------------------------


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _norm_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, rstd = ctx.saved_tensors
    dx = rms_norm_backward(dy, x, weight, rstd) if ctx.needs_input_grad[0] else None
    dweight = None
    if ctx.needs_input_grad[1]:  # someone trains the norm
        normed = (x.float() * rstd).to(x.dtype)
        dweight = (dy.float() * normed).flatten(0, -2).sum(0).to(weight.dtype)
    return dx, dweight, None


def _save_rope(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    _, _, cos, sin, ctx.backward = inputs
    ctx.save_for_backward(cos, sin)


def _rope_backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return *rope(dq, dk, cos, sin, not ctx.backward), None, None, None


def _save_swiglu(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return swiglu_backward(dy, *ctx.saved_tensors)


def _save_seed(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _drop_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return drop(dy, ctx.saved_tensors[0], ctx.p), None, None


_register("rms_norm", _norm_backward, _save_norm)
_register("rope", _rope_backward, _save_rope)
_register("swiglu", _swiglu_backward, _save_swiglu)
_register("drop", _drop_backward, _save_seed)
