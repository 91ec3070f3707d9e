"""SwiGLU with a backward pass that recomputes the activation instead of keeping it."""

from __future__ import annotations

from typing import Any

import lorakit_kernels as kernels
import torch
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up (Shazeer 2020, arXiv:2002.05202, eq. 6); both of one shape and dtype."""
    result: Tensor = _SwiGLU.apply(gate, up)
    return result


class _SwiGLU(torch.autograd.Function):
    """With σ = sigmoid(gate):  dup = dy·gate·σ,  dgate = dy·up·σ·(1 + gate·(1 − σ)). Saves gate and up alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return kernels.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.swiglu_backward(grads[0], *ctx.saved_tensors)
