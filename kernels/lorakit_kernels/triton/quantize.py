"""Values to codes: `quantize_4bit` and `quantize_8bit`.

A program takes whole blocks, one per row, and keeps them in registers between two passes: the largest magnitude, then
the codes. The bits agree with the definition because every step is the same fp32 operation: an IEEE 754 division, a
product, comparisons.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import block_count, boundary_count, readable, readable_source
from ..ops import codec as definition
from .device import look_up, pack
from .launch import on_device_of

VALUES = 4096  # values per program, or one block if that is larger; with 4 warps 32 per thread
WARPS = 4
_LARGEST_BLOCK = 4096


def quantize_4bit(x: Tensor, boundaries: Tensor, order: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """See `ops.codec.quantize_4bit`.

    Raises:
        ValueError: a tensor has another dtype, size or device than the operation reads. All functions here raise this.
    """
    if block_size > _LARGEST_BLOCK or block_size % 8:  # a word must lie in one block
        return definition.quantize_4bit.definition(x, boundaries, order, block_size)
    steps = boundary_count(boundaries, 15)
    order = readable("order", order, torch.uint8, steps + 1, x.device)
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int32, device=x.device)
    absmax = _launch(x, boundaries, order, words, block_size, table=16)
    return words.view(torch.uint8)[: (x.numel() + 1) // 2], absmax


def quantize_8bit(x: Tensor, boundaries: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """See `ops.codec.quantize_8bit`."""
    if block_size > _LARGEST_BLOCK:
        return definition.quantize_8bit.definition(x, boundaries, block_size)
    boundary_count(boundaries, 255)
    codes = torch.empty(x.numel(), dtype=torch.uint8, device=x.device)
    return codes, _launch(x, boundaries, None, codes, block_size, table=256)


def _launch(
    x: Tensor, boundaries: Tensor, order: Tensor | None, codes: Tensor, block_size: int, table: int
) -> Tensor:  # fmt: skip
    """Fill `codes`, packed if there is an order, and return the scales, (blocks,) fp32."""
    x = readable_source(x, x.device)
    scales, steps = block_count(x.numel(), block_size), boundaries.numel()
    boundaries = readable("boundaries", boundaries, torch.float32, steps, x.device)
    absmax = torch.empty(scales, dtype=torch.float32, device=x.device)
    width = triton.next_power_of_2(block_size)
    rows = max(1, VALUES // width)
    if scales:
        with on_device_of(x):
            quantize_kernel[(triton.cdiv(scales, rows),)](
                x, boundaries, order, codes, absmax, x.numel(), steps,
                BLOCK=block_size, WIDTH=width, ROWS=rows, TABLE=table, num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    return absmax


@triton.jit
def quantize_kernel(
    x: tl.tensor, boundaries: tl.tensor, order: tl.tensor, codes: tl.tensor, absmax: tl.tensor,
    count: tl.tensor, steps: tl.tensor,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, TABLE: tl.constexpr,
) -> None:  # fmt: skip
    """x (count,) -> absmax (blocks,) and codes, int32 words of eight if there is an order: a program takes ROWS blocks.

    WIDTH is BLOCK rounded up to a power of 2, TABLE a power of 2 above the number of boundaries, `steps`.
    """
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    element = block[:, None] * BLOCK + column[None, :]
    inside = element < count
    if WIDTH > BLOCK:
        inside = inside & (column < BLOCK)[None, :]
    values = tl.load(x + element, mask=inside, other=0.0).to(tl.float32)

    # Without their sign bits, floats are ordered like integers. nan is above inf, so a block with a nan gets a nan.
    magnitudes = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    scale = tl.max(magnitudes, axis=1).to(tl.float32, bitcast=True)
    tl.store(absmax + block, scale, mask=block * BLOCK < count)

    # A plain "/" would be an approximation on a GPU. Zero stays zero even if the reciprocal is inf.
    reciprocal = tl.math.div_rn(tl.full([ROWS], 1.0, tl.float32), scale)
    scaled = tl.where(values == 0.0, 0.0, values * reciprocal[:, None])
    rank = tl.minimum(_boundaries_below(scaled, boundaries, steps, TABLE), steps)
    if order is None:
        tl.store(codes + element, rank.to(tl.uint8), mask=inside)
    else:
        # Elements after the last were loaded as zeros, which gives the code that pads an odd count.
        entry = tl.arange(0, TABLE)
        code = look_up(tl.load(order + entry, mask=entry <= steps, other=0).to(tl.int32), rank)
        words = pack(tl.reshape(code, [ROWS, WIDTH // 8, 8]))
        first = tl.arange(0, WIDTH // 8) * 8  # element of each word
        position = block[:, None] * BLOCK + first[None, :]
        tl.store(codes + position // 8, words, mask=(position < count) & (first < BLOCK)[None, :])


@triton.jit
def _boundaries_below(s: tl.tensor, boundaries: tl.tensor, steps: tl.tensor, TABLE: tl.constexpr) -> tl.tensor:
    """Return the number of boundaries strictly below s, by binary search; TABLE - 1 for nan, which passes them all."""
    entry = tl.arange(0, TABLE)
    table = tl.load(boundaries + entry, mask=entry < steps, other=float("inf"))  # inf is below no element
    rank = tl.zeros(s.shape, tl.int32)
    for halving in tl.static_range(1, 9):
        if TABLE >> halving:
            rank += tl.where(s <= look_up(table, rank + ((TABLE >> halving) - 1)), 0, TABLE >> halving)
    return rank
