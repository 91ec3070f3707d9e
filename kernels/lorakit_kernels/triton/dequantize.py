"""Codes to values: `dequantize_4bit`, double-quantized scales included, and `dequantize_8bit`.

A program takes a row of words, eight codes each. A thread loads four words at once, the program hands the words round
in shared memory, and a thread then computes the eight values of single words, which it writes at once: 16 bytes a load
and a store, neighbouring threads at neighbouring addresses in both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .arguments import blocks, readable, readable_nested, words_of
from .device import load_scales, look_up, unpack
from .launch import on_device_of

WORDS = 1024  # words a program; with 4 warps a thread computes 64 weights
WARPS = 4
VALUES_8BIT = 2048  # values a program


def dequantize_4bit(
    packed: Tensor,
    codebook: Tensor,
    absmax: Tensor,
    block_size: int,
    out: Tensor,
    nested: Sequence[Tensor] = (),
    nested_block_size: int = 256,
) -> None:
    """See `reference.dequantize_4bit`.

    Raises:
        ValueError: a tensor has another dtype, size or device than the operation reads; so for all functions here.
    """
    if block_size % 8 or not out.dtype.is_floating_point:  # a word must lie in one block
        return reference.dequantize_4bit(packed, codebook, absmax, block_size, out, nested, nested_block_size)
    count, device = out.numel(), out.device
    if not out.is_contiguous():
        raise ValueError("out must be contiguous")
    words = words_of(packed, count, device)
    codebook = readable("codebook", codebook, torch.float32, 16, device)
    absmax = readable("absmax", absmax, torch.uint8 if nested else torch.float32, blocks(count, block_size), device)
    scales = readable_nested(nested, nested_block_size, len(absmax), device)
    if count:
        with on_device_of(out):
            dequantize_4bit_kernel[(triton.cdiv(len(words), WORDS),)](
                words, codebook, absmax, scales.codebook, scales.absmax, scales.offset, out, count, len(words),
                BLOCK=block_size, NESTED=scales.block_size, WORDS=WORDS, num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    return None


@triton.jit
def dequantize_4bit_kernel(
    packed: tl.tensor, codebook: tl.tensor, absmax: tl.tensor,
    nested_codebook: tl.tensor, nested_absmax: tl.tensor, nested_offset: tl.tensor,
    out: tl.tensor, count: tl.tensor, words: tl.tensor,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, WORDS: tl.constexpr,
) -> None:  # fmt: skip
    """packed (words,) int32 -> out (count,): one program computes 8 * WORDS values."""
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    codes = unpack(tl.load(packed + word, mask=word < words, other=0))
    scale = load_scales(
        absmax, nested_codebook, nested_absmax, nested_offset, word // (BLOCK // 8), word < words, NESTED
    )
    values = look_up(tl.load(codebook + tl.arange(0, 16)), codes) * scale[:, None]
    element = word[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out + element, values.to(out.dtype.element_ty), mask=element < count)


def dequantize_8bit(codes: Tensor, codebook: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """See `reference.dequantize_8bit`."""
    count, device = codes.numel(), codes.device
    codes = readable("codes", codes, torch.uint8, count, device)
    codebook = readable("codebook", codebook, torch.float32, 256, device)
    absmax = readable("absmax", absmax, torch.float32, blocks(count, block_size), device)
    values = torch.empty(count, dtype=torch.float32, device=device)
    if count:
        with on_device_of(values):
            dequantize_8bit_kernel[(triton.cdiv(count, VALUES_8BIT),)](
                codes, codebook, absmax, values, count, BLOCK=block_size, VALUES=VALUES_8BIT, enable_fp_fusion=False
            )
    return values


@triton.jit
def dequantize_8bit_kernel(
    codes: tl.tensor, codebook: tl.tensor, absmax: tl.tensor, out: tl.tensor, count: tl.tensor,
    BLOCK: tl.constexpr, VALUES: tl.constexpr,
) -> None:  # fmt: skip
    """codes (count,) uint8 -> out (count,) fp32: one program computes VALUES values."""
    element = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    inside = element < count
    code = tl.load(codes + element, mask=inside, other=0).to(tl.int32)
    scale = tl.load(absmax + element // BLOCK, mask=inside, other=0.0)
    tl.store(out + element, look_up(tl.load(codebook + tl.arange(0, 256)), code) * scale, mask=inside)
