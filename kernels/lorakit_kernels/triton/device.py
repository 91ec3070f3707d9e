"""Functions that run inside the kernels: they unpack codes, look values up and read scales.

Eight codes are read as one 32-bit word. Its bytes are in order, but within a byte the even element is in the high
nibble. Element e of a word is therefore at bit 4e with the lowest bit of e flipped:

    element  0  1  2  3  4  5  6  7
    bit      4  0 12  8 20 16 28 24      = (4 e) xor 4

Look-ups go through `tl.gather`, which keeps the table in shared memory. Its 16 entries of 4 bytes lie in 16 different
banks, so no two lanes wait for each other, whatever the codes. Each weight takes two instructions less than with a
look-up in global memory, which needs 64-bit addresses.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unpack(words: tl.tensor) -> tl.tensor:
    """Return the codes, (..., 8) int32 in 0..15, of words (...) int32."""
    return (tl.expand_dims(words, -1) >> ((tl.arange(0, 8) * 4) ^ 4)) & 15


@triton.jit
def pack(codes: tl.tensor) -> tl.tensor:
    """Return the words, (rows, words) int32, of codes (rows, words, 8) int32."""
    return tl.sum(codes << ((tl.arange(0, 8) * 4) ^ 4), axis=2)


@triton.jit
def look_up(table: tl.tensor, index: tl.tensor) -> tl.tensor:
    """Return table[index], of index's shape, for a table (entries,)."""
    return tl.reshape(tl.gather(table, tl.reshape(index, [index.numel]), 0), index.shape)


@triton.jit
def load_scales(
    absmax: tl.tensor, nested_codebook: tl.tensor, nested_absmax: tl.tensor, nested_offset: tl.tensor,
    block: tl.tensor, mask: tl.tensor, NESTED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the fp32 scales of blocks, of block's shape.

    With NESTED = 0, absmax is fp32. Otherwise it is uint8 codes, NESTED is the number of scales per nested block, and
    a scale is codebook[code] * absmax + offset. Product and sum are each rounded: kernels are compiled without fusing.
    """
    if NESTED == 0:
        scale = tl.load(absmax + block, mask=mask, other=0.0)
    else:
        value = tl.load(nested_codebook + tl.load(absmax + block, mask=mask, other=0).to(tl.int32))
        scale = value * tl.load(nested_absmax + block // NESTED, mask=mask, other=0.0) + tl.load(nested_offset)
    return scale


@triton.jit
def load_weights(
    packed: tl.tensor, table: tl.tensor, absmax: tl.tensor,
    nested_codebook: tl.tensor, nested_absmax: tl.tensor, nested_offset: tl.tensor,
    row: tl.tensor, first: tl.tensor, rows: tl.tensor, columns: tl.tensor, dtype: tl.constexpr,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, COLUMNS: tl.constexpr, ONE_SCALE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return values of a weight (rows, columns) from column `first`: (len(row), COLUMNS) of `dtype`.

    Elements outside the weight get some finite number. With ONE_SCALE, COLUMNS columns lie in one block, so a row needs
    one scale instead of one per word.
    """
    word = first // 8 + tl.arange(0, COLUMNS // 8)
    position = row.to(tl.int64)[:, None] * (columns // 8) + word[None, :]
    inside = (row < rows)[:, None] & (word < columns // 8)[None, :]
    codes = unpack(tl.load(packed + position, mask=inside, other=0))
    if ONE_SCALE:
        block = (row.to(tl.int64) * columns + first) // BLOCK
        scale = load_scales(absmax, nested_codebook, nested_absmax, nested_offset, block, row < rows, NESTED)[:, None]
    else:
        block = position // (BLOCK // 8)
        scale = load_scales(absmax, nested_codebook, nested_absmax, nested_offset, block, inside, NESTED)
    values = look_up(table, codes) * scale[:, :, None]
    return tl.reshape(values.to(dtype), [row.shape[0], COLUMNS])


@triton.jit
def load_matrix(
    matrix: tl.tensor, row: tl.tensor, column: tl.tensor, rows: tl.tensor, columns: tl.tensor
) -> tl.tensor:  # fmt: skip
    """Return the elements of a matrix (rows, columns) at some rows and columns, zero outside it."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(matrix + row.to(tl.int64)[:, None] * columns + column[None, :], mask=inside, other=0.0)
