"""What the functions check of their arguments before C++ reads and writes behind the pointers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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


class Weight(NamedTuple):
    """A 4-bit weight whose tensors are contiguous and as large as its elements need."""

    packed: Tensor
    codebook: Tensor
    absmax: Tensor
    nested: list[Tensor]  # codebook, absmax, offset; or none
    nested_block_size: int
    block_size: int

    def pointers(self) -> tuple[int | None, ...]:
        """Return what the functions take of a weight, as `struct Weight` in dequantize.h has it."""
        tensors = self.packed.data_ptr(), self.codebook.data_ptr(), self.absmax.data_ptr()
        nested = [tensor.data_ptr() for tensor in self.nested] or (None, None, None)
        return *tensors, *nested, self.nested_block_size, self.block_size


def weight(
    count: int,
    packed: Tensor,
    codebook: Tensor,
    absmax: Tensor,
    block_size: int,
    nested: Sequence[Tensor],
    nested_block_size: int,
) -> Weight:
    """Return a weight of `count` elements, checked."""
    blocks = block_count(count, block_size, even=True)
    sizes = (256, block_count(blocks, nested_block_size), 1)
    return Weight(
        readable("packed", packed, torch.uint8, (count + 1) // 2),
        readable("codebook", codebook, torch.float32, 16),
        readable("absmax", absmax, torch.uint8 if nested else torch.float32, blocks),
        [
            readable(f"nested {name}", tensor, torch.float32, size)
            for name, tensor, size in zip(("codebook", "absmax", "offset"), nested, sizes, strict=bool(nested))
        ],
        nested_block_size,
        block_size,
    )
