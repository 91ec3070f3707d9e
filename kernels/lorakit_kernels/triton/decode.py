"""Products of a few tokens with a 4-bit weight, as in generating text: reading the codes takes most of the time.

The kernel computes the transpose, y^T = W x^T. The many rows of the weight fill the 16 rows of a tensor-core
instruction, and the few tokens are its narrow side, 16 wide. A program takes few rows, so that there are enough
programs for all processors. It takes wide steps, so that a row is read in whole cache lines.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import load_matrix, load_weights


@triton.jit
def decode_kernel(
    x: tl.tensor, packed: tl.tensor, codebook: tl.tensor, absmax: tl.tensor,
    nested_codebook: tl.tensor, nested_absmax: tl.tensor, nested_offset: tl.tensor,
    bias: tl.tensor, u: tl.tensor, lora_b: tl.tensor, y: tl.tensor,
    tokens: tl.tensor, rows: tl.tensor, columns: tl.tensor, rank: tl.tensor, scaling: tl.tensor,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, ONE_SCALE: tl.constexpr,
    FEATURES: tl.constexpr, STEP: tl.constexpr, RANK_STEP: tl.constexpr,
) -> None:  # fmt: skip
    """y (tokens, rows) = x (tokens, columns) W^T + bias + scaling u B^T: at most 16 tokens and FEATURES rows of W."""
    token = tl.arange(0, 16)
    row = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    table = tl.load(codebook + tl.arange(0, 16))
    sums = tl.zeros([FEATURES, 16], tl.float32)
    if u is not None:
        for start in range(0, rank, RANK_STEP):
            component = start + tl.arange(0, RANK_STEP)
            right = load_matrix(u, token, component, tokens, rank).T
            sums = tl.dot(load_matrix(lora_b, row, component, rows, rank), right, sums, input_precision="ieee")
        sums *= scaling
    for start in range(0, columns, STEP):
        weight = load_weights(
            packed, table, absmax, nested_codebook, nested_absmax, nested_offset,
            row, start, rows, columns, x.dtype.element_ty, BLOCK, NESTED, STEP, ONE_SCALE,
        )  # fmt: skip
        right = load_matrix(x, token, start + tl.arange(0, STEP), tokens, columns).T
        sums = tl.dot(weight, right, sums, input_precision="ieee")
    if bias is not None:
        sums += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    inside = (row < rows)[:, None] & (token < tokens)[None, :]
    tl.store(y + token[None, :].to(tl.int64) * rows + row[:, None], sums.to(y.dtype.element_ty), mask=inside)
