"""Dropout of an adapter's input, of which only a seed is kept for the backward pass."""

from __future__ import annotations

import torch
from lorakit_kernels import drop
from torch import Tensor


def draw_seed() -> Tensor:
    """Return a seed () int64 for `lorakit_kernels.drop`, from PyTorch's generator of the CPU, whatever the device."""
    return torch.randint(2**63 - 1, (), device="cpu")  # where a default device is set, too


def dropout(x: Tensor, p: float) -> Tensor:
    """Return x / (1 − p) with each element zero with probability p (Srivastava et al. 2014), of x's shape and dtype."""
    return drop(x, draw_seed(), p) / (1 - p)
