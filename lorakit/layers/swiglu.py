"""SwiGLU with a backward pass that recomputes the activation instead of keeping it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up (Shazeer 2020, arXiv:2002.05202, eq. 6); both of one shape and dtype."""
    result: Tensor = _SwiGLU.apply(gate, up)
    return result


class _SwiGLU(torch.autograd.Function):
    """With σ = sigmoid(gate):  dup = dy·gate·σ,  dgate = dy·up·σ·(1 + gate·(1 − σ)). Saves gate and up alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dy = grads[0]
        dgate = torch.ops.aten.silu_backward(dy * up, gate)
        return dgate, silu(gate).mul_(dy)
