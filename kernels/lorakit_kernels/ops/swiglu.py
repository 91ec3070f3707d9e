"""SwiGLU (Shazeer 2020, arXiv:2002.05202, eq. 6). Its backward pass recomputes the activation.

    y = silu(g)·u, σ = sigmoid(g)        du = dy·g·σ,  dg = dy·u·σ·(1 + g·(1 − σ))

Other backends agree to the rounding of an exponential.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..dispatch import differentiate, operation


def _empty_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@operation(fake=_empty_swiglu)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up. All tensors have one shape and dtype."""
    return silu(gate) * up


def _empty_swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


@operation(fake=_empty_swiglu_backward, by_definition=True)
def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return dgate = dy·up·σ·(1 + gate·(1 − σ)) and dup = dy·gate·σ. All tensors have one shape and dtype."""
    wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
    sigma = torch.sigmoid(wide)
    dgate = (dy * up) * (sigma * (1 + wide * (1 - sigma)))
    return dgate.to(gate.dtype), silu(gate) * dy


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return swiglu_backward(dy, *ctx.saved_tensors)


differentiate(swiglu, _backward, _save)
