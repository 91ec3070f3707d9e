"""Products with a 4-bit weight: straight from the codes for few tokens, from bands of values for many.

A band is a part of the weight whose values fit a small reused workspace, so memory does not grow with the weight. A
forward band is some rows of W and gives some columns of y. A backward band is some columns of W and gives some columns
of dx. Either way each element of the result is one sum with one rounding, as without bands.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..arguments import readable, readable_weight
from ..operands import Weight4bit
from ..ops import linear_4bit as definition
from .codec import dequantize_4bit_out
from .loading import CPU, DTYPES, library, pointers, threads
from .workspace import workspace

FEW_TOKENS = 32  # above, values and PyTorch's product are faster: 64 tokens take 0.9 of the time at 4096 x 4096
BAND_BYTES = 32 << 20  # bytes of values at a time; bands of 8 MiB make products of 512 tokens 4 to 8% slower
_ALIGNMENT = 64  # a band is a multiple of so many rows or columns


def linear_4bit(
    x: Tensor, weight: Weight4bit, bias: Tensor | None = None, lora: Sequence[Tensor] = (), scaling: float = 1.0
) -> Tensor:
    """See `ops.linear_4bit.linear_4bit`."""
    rows, columns = weight.shape
    if not _is_supported(x, columns):
        return definition.linear_4bit.definition(x, weight, bias, lora, scaling)
    weight = readable_weight(weight, rows * columns, CPU)
    flat = x.reshape(math.prod(x.shape[:-1]), columns)
    result = x.new_empty(*x.shape[:-1], rows)  # no view itself, or a custom function's caller could not write to it
    y = result if x.dim() == 2 else result.view(len(flat), rows)
    if len(flat) <= FEW_TOKENS and _blocks_fit(weight.block_size, columns):
        _multiply_codes(flat, weight, bias, y)
    else:
        for first, last in bands(rows, columns * x.itemsize):
            band = _dequantize_band(weight, x.dtype, (first, last), (0, columns)).T
            out = y[:, first:last]
            if bias is None:
                torch.mm(flat, band, out=out)
            else:
                torch.addmm(bias[first:last], flat, band, out=out)
    if lora:
        u, lora_b = lora
        y.addmm_(u.reshape(len(flat), u.shape[-1]), lora_b.T, alpha=scaling)
    return result


def linear_4bit_dx(dy: Tensor, weight: Weight4bit, lora: Sequence[Tensor] = ()) -> Tensor:
    """See `ops.linear_4bit.linear_4bit_dx`."""
    columns = weight.shape[1]
    if lora:
        t, lora_a = lora
        dx = t.reshape(math.prod(t.shape[:-1]), t.shape[-1]) @ lora_a
    else:
        dx = dy.new_empty(math.prod(dy.shape[:-1]), columns)
    _accumulate(dx, dy, weight, beta=1 if lora else 0)
    return dx.view(*dy.shape[:-1], columns)


def add_linear_4bit_dx(dx: Tensor, dy: Tensor, weight: Weight4bit) -> None:
    """See `ops.linear_4bit.add_linear_4bit_dx`."""
    _accumulate(dx.view(math.prod(dx.shape[:-1]), weight.shape[1]), dy, weight, beta=1)


def _accumulate(dx: Tensor, dy: Tensor, weight: Weight4bit, beta: int) -> None:
    """Write beta * dx + dy W into dx, (tokens, in_features)."""
    rows, columns = weight.shape
    flat = dy.reshape(math.prod(dy.shape[:-1]), rows)
    if not _is_supported(dy, columns):
        values = torch.empty(rows, columns, dtype=dy.dtype)
        dequantize_4bit_out(weight, values)
        dx.addmm_(flat, values, beta=beta)
        return
    weight = readable_weight(weight, rows * columns, CPU)
    for first, last in bands(columns, rows * dy.itemsize):
        band = _dequantize_band(weight, dy.dtype, (0, rows), (first, last))
        dx[:, first:last].addmm_(flat, band, beta=beta)


def _is_supported(x: Tensor, columns: int) -> bool:
    """Return whether C++ takes x's dtype and can cut bands out of rows with so many columns."""
    return x.dtype in DTYPES and columns > 0 and columns % 2 == 0


def _blocks_fit(block_size: int, columns: int) -> bool:
    """Return whether matmul.cpp can read blocks of this size."""
    return block_size >= 64 and block_size & (block_size - 1) == 0 and columns % block_size == 0


def _multiply_codes(x: Tensor, weight: Weight4bit, bias: Tensor | None, y: Tensor) -> None:
    """Write x Wᵀ + bias into y, (tokens, out_features), for few tokens, straight from the codes."""
    tokens, (rows, columns) = len(x), weight.shape
    x = readable("x", x, x.dtype, tokens * columns, CPU)
    bias = bias if bias is None else readable("bias", bias, x.dtype, rows, CPU)
    library().linear_4bit(
        x.data_ptr(), DTYPES[x.dtype], tokens, *pointers(weight), rows, columns,
        None if bias is None else bias.data_ptr(), y.data_ptr(), *threads(),
    )  # fmt: skip


def bands(count: int, bytes_each: int) -> Iterator[tuple[int, int]]:
    """Yield the first row or column of each band, and the end before which it stops."""
    step = max(1, BAND_BYTES // max(1, bytes_each) // _ALIGNMENT) * _ALIGNMENT
    for first in range(0, count, step):
        yield first, min(first + step, count)


def _dequantize_band(weight: Weight4bit, dtype: torch.dtype, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """Return the values in some rows and columns of a weight, in the workspace."""
    height, width = rows[1] - rows[0], columns[1] - columns[0]
    out = workspace((height, width), dtype)
    library().dequantize_part(
        *pointers(weight), weight.shape[1], rows[0], height, columns[0], width, out.data_ptr(), DTYPES[dtype],
        *threads(),
    )  # fmt: skip
    return out
