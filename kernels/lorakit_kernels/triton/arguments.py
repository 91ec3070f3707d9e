"""Checks of what a kernel cannot see: the dtypes, sizes and devices behind the pointers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Nested(NamedTuple):
    """What turns 8-bit codes into scales, or nothing at all where the scales are fp32."""

    codebook: Tensor | None = None  # (256,) fp32
    absmax: Tensor | None = None  # (ceil(blocks / block_size),) fp32
    offset: Tensor | None = None  # () fp32
    block_size: int = 0


def readable(name: str, tensor: Tensor, dtype: torch.dtype, count: int, device: torch.device) -> Tensor:
    """Return the tensor, contiguous, once it is safe to read `count` elements behind its pointer.

    Raises:
        ValueError: it is of another dtype, too small or elsewhere.
    """
    if tensor.dtype != dtype or tensor.numel() < count or tensor.device != device:
        raise ValueError(
            f"{name} must have at least {count} elements of {dtype} on {device}, "
            f"got {tensor.numel()} of {tensor.dtype} on {tensor.device}"
        )
    return tensor.contiguous()


def readable_nested(nested: Sequence[Tensor], block_size: int, scales: int, device: torch.device) -> Nested:
    """Return the nested arguments of an operation once they are safe to read for this many scales."""
    if not nested:
        return Nested()
    codebook, absmax, offset = nested
    return Nested(
        readable("nested codebook", codebook, torch.float32, 256, device),
        readable("nested absmax", absmax, torch.float32, blocks(scales, block_size), device),
        readable("nested offset", offset, torch.float32, 1, device),
        block_size,
    )


def words_of(packed: Tensor, count: int, device: torch.device) -> Tensor:
    """Return packed codes as (ceil(count / 8),) int32; a copy where the bytes are no whole words, or not aligned."""
    size, needed = (count + 1) // 2, -(-count // 8) * 4
    flat = readable("packed", packed, torch.uint8, size, device).view(-1)[:size]
    if size < needed:
        flat = pad(flat, (0, needed - size))
    elif flat.data_ptr() % 4:
        flat = flat.clone()
    return flat.view(torch.int32)


def blocks(count: int, block_size: int, even: bool = False) -> int:
    """Return the number of blocks of `count` elements."""
    if block_size < 1 or (even and block_size % 2):
        raise ValueError(f"block_size must be {'even and ' if even else ''}positive, got {block_size}")
    return -(-count // block_size)


def at_most(limit: int, boundaries: Tensor) -> int:
    """Return the number of boundaries."""
    if boundaries.numel() > limit:
        raise ValueError(f"expected at most {limit} boundaries, got {boundaries.numel()}")
    return boundaries.numel()
