"""Codes to values: `dequantize_4bit_out`, double-quantized scales included, and `dequantize_8bit`.

A program takes a row of words, eight codes each. A thread loads four words at once. The program exchanges the words
through shared memory. A thread then computes the eight values of one word and writes them at once. Loads and stores are
16 bytes each, and neighbouring threads use neighbouring addresses in both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import block_count, readable
from ..operands import Weight4bit
from ..ops import codec as definition
from .arguments import KernelWeight
from .device import load_scales, look_up, unpack
from .launch import on_device_of

WORDS = 1024  # words per program; with 4 warps a thread computes 64 weights
WARPS = 4
VALUES_8BIT = 2048  # values per program


def dequantize_4bit_out(weight: Weight4bit, out: Tensor) -> None:
    """See `ops.codec.dequantize_4bit_out`.

    Raises:
        ValueError: a tensor has another dtype, size or device than the operation reads. All functions here raise this.
    """
    if weight.block_size % 8 or not out.dtype.is_floating_point:  # a word must lie in one block
        return definition.dequantize_4bit_out.definition(weight, out)
    count = out.numel()
    if not out.is_contiguous():
        raise ValueError("out must be contiguous")
    checked = KernelWeight.of(weight, count, out.device)
    words = len(checked.words)
    if count:
        with on_device_of(out):
            dequantize_4bit_kernel[(triton.cdiv(words, WORDS),)](
                *checked.tensors(), out, count, words,
                BLOCK=weight.block_size, NESTED=checked.nested_block_size, WORDS=WORDS, num_warps=WARPS,
                enable_fp_fusion=False,
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
    """See `ops.codec.dequantize_8bit`."""
    count, device = codes.numel(), codes.device
    codes = readable("codes", codes, torch.uint8, count, device)
    codebook = readable("codebook", codebook, torch.float32, 256, device)
    absmax = readable("absmax", absmax, torch.float32, block_count(count, block_size), device)
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
