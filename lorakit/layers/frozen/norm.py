"""RMSNorm. Its backward pass in `lorakit_kernels.ops.rms_norm` skips the gradient of a frozen weight."""

from __future__ import annotations

import lorakit_kernels as kernels
import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square normalization (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4).

        y = weight * x / sqrt(mean(x²) + eps)

    Statistics are fp32. As in transformers, the normalized x is rounded to x's dtype before the weight multiplies it.

    Shapes:
        x (..., size) -> y (..., size)
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y, _ = kernels.rms_norm(x, self.weight, self.eps)
        return y
