"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4). Its backward pass skips the gradient of a frozen weight.

    y = w·x̂, x̂ = x·rstd        g = w·dy,  dx = rstd·(g − x̂·mean(g·x̂)),  dw = Σ dy·x̂

The forward pass saves x in its own dtype and rstd, one number per row. Other backends agree to the rounding of a sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import differentiate, operation


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _empty_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    return y, x.new_empty((*x.shape[:-1], 1), dtype=_wide(x))


@operation(fake=_empty_norm)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return weight * x·rstd and rstd = 1 / sqrt(mean(x²) + eps).

    Statistics are fp32 or better. As in transformers, x·rstd is rounded to x's dtype before the weight multiplies it.

    Args:
        x: (..., size), fp32, bf16 or fp16.
        weight: (size,).

    Returns:
        y (..., size) in the dtype that x and weight promote to, and rstd (..., 1), fp32 or better, without gradient.
    """
    wide = x.to(_wide(x))
    rstd = _rstd(wide, eps)
    return weight * (wide * rstd).to(x.dtype), rstd.detach()


def _rstd(wide: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def _empty_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@operation(fake=_empty_norm_backward, by_definition=True)
def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """Return dx = rstd·(g − x̂·mean(g·x̂)) with x̂ = x·rstd and g = weight·dy, in x's shape and dtype.

    Args:
        dy: (..., size) of y's dtype.
        x, weight: as for `rms_norm`.
        rstd: (..., 1), fp32 or better, from `rms_norm`.
    """
    normed = x.to(_wide(x)) * rstd
    g = (dy * weight).to(_wide(x))
    dx = (g - normed * (g * normed).mean(-1, keepdim=True)) * rstd
    return dx.to(x.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, rstd = ctx.saved_tensors
    if torch.is_grad_enabled():  # the saved one is no function of x to autograd
        rstd = _rstd(x.to(_wide(x)), ctx.eps)
    dx = rms_norm_backward(dy, x, weight, rstd) if ctx.needs_input_grad[0] else None
    dweight = None
    if ctx.needs_input_grad[1]:  # the norm is trained
        normed = (x.to(_wide(x)) * rstd).to(x.dtype)
        dweight = (dy.to(_wide(x)) * normed).reshape(-1, len(weight)).sum(0).to(weight.dtype)
    return dx, dweight, None


differentiate(rms_norm, _backward, _save)
