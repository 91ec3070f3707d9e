"""RMSNorm with a frozen weight, forward and backward.

A program takes whole rows that make a tile of about 2,048 elements: one row of a hidden state, or 32 rows of a head
with 64 dimensions. Each element is read once and written once. Only rstd, one number per row, is kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import ASTSource

from .launch import on_device_of, source

_TILE = 2048  # elements


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `ops.rms_norm.rms_norm`.

    Raises:
        ValueError: the weight is not as long as a row of x. `rms_norm_backward` raises this too.
    """
    size = _row_size(x, weight)
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    if rows := rstd.numel():
        tile = _tile(size)
        with on_device_of(x):
            rms_norm_kernel[(triton.cdiv(rows, tile["ROWS"]),)](x, weight, y, rstd, rows, size, eps, **tile)
    return y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """See `ops.rms_norm.rms_norm_backward`."""
    size = _row_size(x, weight)
    dy, x, weight, rstd = (tensor.contiguous() for tensor in (dy, x, weight, rstd))
    dx = torch.empty_like(x)
    if rows := rstd.numel():
        tile = _tile(size)
        with on_device_of(x):
            rms_norm_backward_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
                dy, x, weight, rstd, dx, rows, size, **tile
            )  # fmt: skip
    return dx


def _row_size(x: Tensor, weight: Tensor) -> int:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be ({x.shape[-1]},), as long as a row of x; got {tuple(weight.shape)}")
    return x.shape[-1]


def _tile(size: int) -> dict[str, int]:
    columns = triton.next_power_of_2(size)
    return {"ROWS": max(1, _TILE // columns), "COLUMNS": columns, "num_warps": min(16, max(4, columns // 1024))}


@triton.jit
def rms_norm_kernel(
    x: tl.tensor, weight: tl.tensor, y: tl.tensor, rstd: tl.tensor, rows: tl.tensor, size: tl.tensor, eps: tl.tensor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """y = weight * x·rstd of ROWS rows; COLUMNS is the next power of 2 of their size."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    offset = row[:, None] * size + column[None, :]
    mask = (row < rows)[:, None] & (column < size)[None, :]
    values = tl.load(x + offset, mask=mask, other=0.0)
    wide = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / size + eps)
    normed = (wide * scale[:, None]).to(values.dtype).to(tl.float32)  # rounded as in the definition
    w = tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
    tl.store(y + offset, normed * w[None, :], mask=mask)
    tl.store(rstd + row, scale, mask=row < rows)


@triton.jit
def rms_norm_backward_kernel(
    dy: tl.tensor, x: tl.tensor, weight: tl.tensor, rstd: tl.tensor, dx: tl.tensor, rows: tl.tensor, size: tl.tensor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """dx = rstd·(g − x̂·mean(g·x̂)) of ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    offset = row[:, None] * size + column[None, :]
    mask = (row < rows)[:, None] & (column < size)[None, :]
    scale = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
    normed = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32) * scale
    w = tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
    g = tl.load(dy + offset, mask=mask, other=0.0).to(tl.float32) * w[None, :]
    mean = tl.sum(g * normed, axis=1)[:, None] / size
    tl.store(dx + offset, (g - normed * mean) * scale, mask=mask)


def sources() -> Iterator[tuple[str, ASTSource]]:
    """Yield kernels for a hidden state of 4,096 and for heads of 128, in bf16."""
    for size in (4096, 128):
        tile = {key: value for key, value in _tile(size).items() if key != "num_warps"}
        shape = {"rows": "i32", "size": "i32:16"}
        forward = {"x": "*bf16", "weight": "*bf16", "y": "*bf16", "rstd": "*fp32", **shape, "eps": "fp32"}
        yield f"rms_norm {size}", source(rms_norm_kernel, forward, tile)
        backward = {"dy": "*bf16", "x": "*bf16", "weight": "*bf16", "rstd": "*fp32", "dx": "*bf16", **shape}
        yield f"rms_norm_backward {size}", source(rms_norm_backward_kernel, backward, tile)
