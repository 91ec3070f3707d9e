"""The operations of `reference_training`, registered with torch.library as those of `dispatch` are.

A backend need not have all of them: one that it lacks is computed by the definition. So are fp64 tensors, which
gradients are checked with and no kernel takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import reference_training
from .dispatch import _operation, backend


def _computed_by(x: Tensor, name: str) -> Callable[..., Any]:
    """Return the function of that name of the backend for x, else the definition."""
    chosen = None if x.dtype == torch.float64 else getattr(backend(x.device), name, None)
    function: Callable[..., Any] = chosen or getattr(reference_training, name)
    return function


def _empty_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    return y, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@_operation(fake=_empty_norm)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference_training.rms_norm`."""
    y, rstd = _computed_by(x, "rms_norm")(x, weight, eps)
    return y, rstd


def _empty_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@_operation(fake=_empty_norm_backward)
def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """See `reference_training.rms_norm_backward`."""
    dx: Tensor = _computed_by(x, "rms_norm_backward")(dy, x, weight, rstd)
    return dx


def _empty_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@_operation(fake=_empty_rope)
def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    """See `reference_training.rope`."""
    turned_q, turned_k = _computed_by(q, "rope")(q, k, cos, sin, backward)
    return turned_q, turned_k


def _empty_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@_operation(fake=_empty_swiglu)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `reference_training.swiglu`."""
    y: Tensor = _computed_by(gate, "swiglu")(gate, up)
    return y


def _empty_swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


@_operation(fake=_empty_swiglu_backward)
def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference_training.swiglu_backward`."""
    dgate, dup = _computed_by(gate, "swiglu_backward")(dy, gate, up)
    return dgate, dup


def _empty_dropped(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return x.new_empty(x.shape)


@_operation(fake=_empty_dropped)
def drop(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """See `reference_training.drop`."""
    y: Tensor = _computed_by(x, "drop")(x, seed, p)
    return y


def _empty_losses(logits: Tensor, targets: Tensor, with_gradient: bool) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.float32)


@_operation(writes=("logits",), fake=_empty_losses)
def cross_entropy(logits: Tensor, targets: Tensor, with_gradient: bool) -> Tensor:
    """See `reference_training.cross_entropy`."""
    losses: Tensor = _computed_by(logits, "cross_entropy")(logits, targets, with_gradient)
    if with_gradient:
        increment_version(logits)  # or autograd would not notice that a tensor it saved was overwritten
    return losses


def _nothing(
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    first_absmax: Tensor,
    second: Tensor,
    second_absmax: Tensor,
    first_map: Sequence[Tensor],
    second_map: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    return None


@_operation(writes=("parameter", "first", "first_absmax", "second", "second_absmax"), fake=_nothing)
def adamw_8bit(
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    first_absmax: Tensor,
    second: Tensor,
    second_absmax: Tensor,
    first_map: Sequence[Tensor],
    second_map: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """See `reference_training.adamw_8bit`; the parameter may have any strides, its elements are taken row-major."""
    rows = parameter.contiguous()
    _computed_by(parameter, "adamw_8bit")(
        rows, gradient.contiguous(), first, first_absmax, second, second_absmax, first_map, second_map,
        lr, beta1, beta2, eps, weight_decay, step,
    )  # fmt: skip
    if rows is not parameter:
        parameter.copy_(rows)
    increment_version([parameter, first, first_absmax, second, second_absmax])
