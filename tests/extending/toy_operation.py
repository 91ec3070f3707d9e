"""An operation: a leaky rectifier, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from lorakit_kernels.dispatch import differentiate, operation
from torch import Tensor


def _empty_leaky(x: Tensor, slope: float) -> Tensor:
    return x.new_empty(x.shape)


@operation(fake=_empty_leaky)
def leaky(x: Tensor, slope: float) -> Tensor:
    """Return x where it is positive, else slope * x; same shape and dtype."""
    return torch.where(x > 0, x, slope * x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.slope = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    return torch.where(x > 0, dy, ctx.slope * dy), None


differentiate(leaky, _backward, _save)
