"""Dropout of an adapter's input. The backward pass needs only the seed."""

from __future__ import annotations

import torch
from lorakit_kernels import drop, is_transformed
from torch import Tensor


def draw_seed() -> Tensor:
    """Return a seed, () int64, for `lorakit_kernels.drop`, from PyTorch's CPU generator, whatever the device."""
    return torch.randint(2**63 - 1, (), device="cpu")  # overrides a default device


def dropout(x: Tensor, p: float) -> Tensor:
    """Return x / (1 − p) with each element set to zero with probability p, of x's shape and dtype.

    See Srivastava et al. 2014.
    """
    if is_transformed():  # vmap knows how PyTorch's own dropout draws for each sample
        return torch.nn.functional.dropout(x, p)
    return drop(x, draw_seed(), p) / (1 - p)
