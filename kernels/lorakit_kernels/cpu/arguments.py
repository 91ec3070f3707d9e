"""What the functions check of their arguments before C++ reads and writes behind the pointers."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as `enum Dtype` in blocks.h


def source(x: Tensor) -> Tensor:
    """Return x as the operations read it. Whole, not part by part: of a transposed matrix that is 2.3 times faster."""
    if not x.is_cpu:
        raise ValueError(f"x must be on the CPU, got {x.device}")
    return (x if x.dtype in DTYPES else x.float()).contiguous()


def block_count(count: int, block_size: int, even: bool = False) -> int:
    """Return how many blocks hold `count` elements."""
    if block_size < 1 or (even and block_size % 2):
        raise ValueError(f"block_size must be {'even and ' if even else ''}positive, got {block_size}")
    return -(-count // block_size)


def at_most(limit: int, boundaries: Tensor) -> int:
    """Return how many boundaries there are."""
    if boundaries.numel() > limit:
        raise ValueError(f"expected at most {limit} boundaries, got {boundaries.numel()}")
    return boundaries.numel()


def readable(name: str, tensor: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """Return the tensor, contiguous, once it is safe to read `count` elements behind its pointer."""
    if tensor.dtype != dtype or tensor.numel() < count or not tensor.is_cpu:
        raise ValueError(
            f"{name} must have at least {count} elements of {dtype} on the CPU, "
            f"got {tensor.numel()} of {tensor.dtype} on {tensor.device}"
        )
    return tensor.contiguous()


def writable(name: str, tensor: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """Return the tensor itself, once it is safe to read and write `count` elements behind its pointer."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
    return readable(name, tensor, dtype, count)
