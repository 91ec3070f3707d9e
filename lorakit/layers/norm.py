"""RMSNorm with a hand-written backward pass that skips the gradient of the frozen weight."""

from __future__ import annotations

from typing import Any

import lorakit_kernels as kernels
import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square normalization (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4).

        y = weight * x / sqrt(mean(x²) + eps)

    Statistics are fp32; the normalized x is rounded to x's dtype before the weight multiplies it, as transformers does.

    Shapes:
        x (..., size) -> y (..., size)
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad:  # someone trains the norm: let autograd do it
            normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
            return self.weight * normed.to(x.dtype)
        result: Tensor = _FrozenRMSNorm.apply(x, self.weight, self.eps)
        return result


class _FrozenRMSNorm(torch.autograd.Function):
    """With x̂ = x·rstd and g = weight·dy:  dx = rstd·(g − x̂·mean(g·x̂)). Saves x in its own dtype and rstd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = kernels.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, rstd, weight)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, rstd, weight = ctx.saved_tensors
        return kernels.rms_norm_backward(grads[0], x, weight, rstd), None, None
