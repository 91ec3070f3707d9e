"""Products with a 4-bit weight in one kernel each: `linear_4bit` and, for its backward pass, `linear_4bit_dx`.

A program computes one tile of the result. It walks along the dimension that is summed over. Each step loads codes,
turns them into a tile of values in shared memory, and multiplies on the tensor cores. The weight's values never exist
in global memory. The adapter's product is summed first, into the same fp32 accumulator.

Every row of tiles decodes the weight again. For many tokens it is faster to dequantize once and call an ordinary
product: see `tiles`. Few tokens have a kernel of their own, in `decode`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import FLOATS, readable
from ..operands import Weight4bit
from ..ops import linear_4bit as definition
from .arguments import KernelWeight
from .decode import decode_kernel
from .dequantize import dequantize_4bit_out
from .device import load_matrix, load_weights
from .launch import on_device_of
from .tiles import DECODE_TOKENS, Tile, choose


def linear_4bit(
    x: Tensor, weight: Weight4bit, bias: Tensor | None = None, lora: Sequence[Tensor] = (), scaling: float = 1.0
) -> Tensor:
    """See `ops.linear_4bit.linear_4bit`.

    Raises:
        ValueError: a tensor has another dtype, size or device than the operation reads. All functions here raise this.
    """
    rows, columns = weight.shape
    tokens = math.prod(x.shape[:-1])
    tile = _tile("linear_4bit", x, weight, tokens)
    if tile is None:
        return definition.dense_linear(x, _values(weight, x), bias, lora, scaling)
    x2d = readable("x", x, x.dtype, tokens * columns, x.device)
    checked = KernelWeight.of(weight, rows * columns, x.device)
    if bias is not None:
        bias = readable("bias", bias, x.dtype, rows, x.device)
    u, lora_b, rank = _lora(lora, tokens, rows, x)
    y = torch.empty(*x.shape[:-1], rows, dtype=x.dtype, device=x.device)
    programs = triton.cdiv(rows, tile.features)
    if tokens <= DECODE_TOKENS:
        kernel, sizes = decode_kernel[(programs,)], {}
    else:
        kernel, sizes = linear_kernel[(triton.cdiv(tokens, tile.tokens), programs)], {"TOKENS": tile.tokens}
    with on_device_of(x):
        kernel(
            x2d, *checked.tensors(), bias, u, lora_b, y, tokens, rows, columns, rank, float(scaling),
            BLOCK=weight.block_size, NESTED=checked.nested_block_size,
            ONE_SCALE=checked.has_one_scale(columns, tile.step),
            FEATURES=tile.features, STEP=tile.step, RANK_STEP=_rank_step(rank), **sizes, **tile.options(),
        )  # fmt: skip
    return y


@triton.jit
def linear_kernel(
    x: tl.tensor, packed: tl.tensor, codebook: tl.tensor, absmax: tl.tensor,
    nested_codebook: tl.tensor, nested_absmax: tl.tensor, nested_offset: tl.tensor,
    bias: tl.tensor, u: tl.tensor, lora_b: tl.tensor, y: tl.tensor,
    tokens: tl.tensor, rows: tl.tensor, columns: tl.tensor, rank: tl.tensor, scaling: tl.tensor,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, ONE_SCALE: tl.constexpr,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, STEP: tl.constexpr, RANK_STEP: tl.constexpr,
) -> None:  # fmt: skip
    """y (tokens, rows) = x (tokens, columns) W^T + bias + scaling u (tokens, rank) B^T: a program computes one tile.

    Consecutive programs take the same rows of the weight, which therefore stay in the cache.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    table = tl.load(codebook + tl.arange(0, 16))
    sums = tl.zeros([TOKENS, FEATURES], tl.float32)
    if u is not None:
        for start in range(0, rank, RANK_STEP):
            component = start + tl.arange(0, RANK_STEP)
            left = load_matrix(u, token, component, tokens, rank)
            sums = tl.dot(left, load_matrix(lora_b, row, component, rows, rank).T, sums, input_precision="ieee")
        sums *= scaling
    for start in range(0, columns, STEP):
        left = load_matrix(x, token, start + tl.arange(0, STEP), tokens, columns)
        weight = load_weights(
            packed, table, absmax, nested_codebook, nested_absmax, nested_offset,
            row, start, rows, columns, x.dtype.element_ty, BLOCK, NESTED, STEP, ONE_SCALE,
        )  # fmt: skip
        sums = tl.dot(left, weight.T, sums, input_precision="ieee")
    if bias is not None:
        sums += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    inside = (token < tokens)[:, None] & (row < rows)[None, :]
    tl.store(y + token.to(tl.int64)[:, None] * rows + row[None, :], sums.to(y.dtype.element_ty), mask=inside)


def linear_4bit_dx(dy: Tensor, weight: Weight4bit, lora: Sequence[Tensor] = ()) -> Tensor:
    """See `ops.linear_4bit.linear_4bit_dx`."""
    rows, columns = weight.shape
    tokens = math.prod(dy.shape[:-1])
    tile = _tile("linear_4bit_dx", dy, weight, tokens)
    if tile is None:
        return definition.dense_linear_dx(dy, _values(weight, dy), lora)
    dy2d = readable("dy", dy, dy.dtype, tokens * rows, dy.device)
    checked = KernelWeight.of(weight, rows * columns, dy.device)
    t, lora_a, rank = _lora(lora, tokens, columns, dy)
    dx = torch.empty(*dy.shape[:-1], columns, dtype=dy.dtype, device=dy.device)
    with on_device_of(dy):
        linear_dx_kernel[triton.cdiv(tokens, tile.tokens), triton.cdiv(columns, tile.features)](
            dy2d, *checked.tensors(), t, lora_a, dx, tokens, rows, columns, rank,
            BLOCK=weight.block_size, NESTED=checked.nested_block_size,
            ONE_SCALE=checked.has_one_scale(columns, tile.features),
            TOKENS=tile.tokens, FEATURES=tile.features, STEP=tile.step, RANK_STEP=_rank_step(rank), **tile.options(),
        )  # fmt: skip
    return dx


def add_linear_4bit_dx(dx: Tensor, dy: Tensor, weight: Weight4bit) -> None:
    """See `ops.linear_4bit.add_linear_4bit_dx`."""
    dx += linear_4bit_dx(dy, weight)


@triton.jit
def linear_dx_kernel(
    dy: tl.tensor, packed: tl.tensor, codebook: tl.tensor, absmax: tl.tensor,
    nested_codebook: tl.tensor, nested_absmax: tl.tensor, nested_offset: tl.tensor,
    t: tl.tensor, lora_a: tl.tensor, dx: tl.tensor,
    tokens: tl.tensor, rows: tl.tensor, columns: tl.tensor, rank: tl.tensor,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, ONE_SCALE: tl.constexpr,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, STEP: tl.constexpr, RANK_STEP: tl.constexpr,
) -> None:  # fmt: skip
    """dx (tokens, columns) = dy (tokens, rows) W + t (tokens, rank) A: a program computes one tile.

    Codes are packed along a row, so a tile of W is read as in the forward pass. Here it needs no transposing.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    first = tl.program_id(1) * FEATURES
    column = first + tl.arange(0, FEATURES)
    table = tl.load(codebook + tl.arange(0, 16))
    sums = tl.zeros([TOKENS, FEATURES], tl.float32)
    if t is not None:
        for start in range(0, rank, RANK_STEP):
            component = start + tl.arange(0, RANK_STEP)
            left = load_matrix(t, token, component, tokens, rank)
            sums = tl.dot(left, load_matrix(lora_a, component, column, rank, columns), sums, input_precision="ieee")
    for start in range(0, rows, STEP):
        row = start + tl.arange(0, STEP)
        left = load_matrix(dy, token, row, tokens, rows)
        weight = load_weights(
            packed, table, absmax, nested_codebook, nested_absmax, nested_offset,
            row, first, rows, columns, dy.dtype.element_ty, BLOCK, NESTED, FEATURES, ONE_SCALE,
        )  # fmt: skip
        sums = tl.dot(left, weight, sums, input_precision="ieee")
    inside = (token < tokens)[:, None] & (column < columns)[None, :]
    tl.store(dx + token.to(tl.int64)[:, None] * columns + column[None, :], sums.to(dx.dtype.element_ty), mask=inside)


# ---- arguments -----------------------------------------------------------------------------------------------------


def _tile(operation: str, x: Tensor, weight: Weight4bit, tokens: int) -> Tile | None:
    """Return the tile to compute with, or None if dequantizing first is faster or the only way."""
    rows, columns = weight.shape
    if columns % 8 or weight.block_size % 8 or x.dtype not in FLOATS or not tokens * rows * columns:
        return None  # a word must lie in one row and one block
    return choose(operation, tokens, rows, columns, x.dtype, x.device)


def _values(weight: Weight4bit, x: Tensor) -> Tensor:
    """Return the weight's values in x's dtype, on its device."""
    values = torch.empty(list(weight.shape), dtype=x.dtype, device=x.device)
    dequantize_4bit_out(weight, values)
    return values


def _lora(lora: Sequence[Tensor], tokens: int, features: int, x: Tensor) -> tuple[Tensor | None, Tensor | None, int]:
    """Return the two checked factors and the rank; (None, None, 0) without an adapter."""
    if not lora:
        return None, None, 0
    left, right = lora
    rank = left.shape[-1]
    return (
        readable("lora's first tensor", left, x.dtype, tokens * rank, x.device),
        readable("lora's second tensor", right, x.dtype, rank * features, x.device),
        rank,
    )


def _rank_step(rank: int) -> int:
    """Return how many columns of rank to multiply at a time. Products take at least 16."""
    return 16 if rank <= 16 else 32 if rank <= 32 else 64
