"""The 4-bit and 8-bit codecs.

Block-wise quantization (Dettmers et al. 2023, arXiv:2305.14314, eq. 1-2). A tensor is read flat, in row-major order, in
blocks of `block_size` elements; the last block may be short. Per block, all in fp32:

    absmax = max |x|        s = x * (1 / absmax)        code = order[number of boundaries strictly below s]

A tie goes to the lower value. An element that is zero has s = 0, even in a block whose absmax is zero or so small that
its reciprocal overflows. The inverse is codebook[code] * absmax, rounded once to the output dtype.

Four-bit codes are packed two to a byte, the even element in the high nibble; an odd count is padded with the code of 0.
The definitions work in chunks that stay in the cache and reuse their buffers. On a 4096x4096 matrix this is seven times
faster than one pass: page faults of fresh buffers of that size cost more than the arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..dispatch import operation
from ..operands import Weight4bit

_CHUNK = 1 << 18  # bytes of packed codes per chunk; the fastest of 2^14 .. 2^20 with 1 MiB of L2 cache


# ---- quantization --------------------------------------------------------------------------------------------------


def _empty_8bit(x: Tensor, boundaries: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.numel(), dtype=torch.uint8)
    return codes, x.new_empty((x.numel() + block_size - 1) // block_size, dtype=torch.float32)


@operation(fake=_empty_8bit)
def quantize_8bit(x: Tensor, boundaries: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return codes and scales of `x`, for an ascending codebook.

    Args:
        x: any shape, fp32, bf16 or fp16; read flat.
        boundaries: (values - 1,) fp32, ascending: they separate neighbouring values.
        block_size: elements per block.

    Returns:
        codes (numel,) uint8 and absmax (ceil(numel / block_size),) fp32.
    """
    blocks = pad(x.reshape(-1).float(), (0, -x.numel() % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    scaled = torch.where(blocks == 0, 0.0, blocks * absmax.reciprocal()[:, None])
    codes = torch.bucketize(scaled, boundaries, out_int32=True).to(torch.uint8)
    return codes.view(-1)[: x.numel()], absmax


def _empty_4bit(x: Tensor, boundaries: Tensor, order: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    packed = x.new_empty((x.numel() + 1) // 2, dtype=torch.uint8)
    return packed, x.new_empty((x.numel() + block_size - 1) // block_size, dtype=torch.float32)


@operation(fake=_empty_4bit)
def quantize_4bit(x: Tensor, boundaries: Tensor, order: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return packed 4-bit codes and scales of `x`.

    Args:
        x: any shape, fp32, bf16 or fp16; read flat.
        boundaries: (distinct - 1,) fp32, ascending: they separate neighbouring values.
        order: (distinct,) uint8: the codes in ascending order of their values.
        block_size: elements per block, even.

    Returns:
        packed (ceil(numel / 2),) uint8 and absmax (ceil(numel / block_size),) fp32.
    """
    flat, count = x.reshape(-1), x.numel()
    packed = torch.empty(-(-count // 2), dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-count // block_size), dtype=torch.float32, device=x.device)
    zero = int((boundaries < 0).sum())  # position of 0 among the values
    step = max(1, _CHUNK // block_size) * block_size
    for start in range(0, count, step):
        codes, scale = quantize_8bit.definition(flat[start : start + step], boundaries, block_size)
        codes = order[pad(codes, (0, len(codes) % 2), value=zero).int()]
        packed[start // 2 : (start + len(codes)) // 2] = codes[0::2] << 4 | codes[1::2]
        absmax[start // block_size : start // block_size + len(scale)] = scale
    return packed, absmax


# ---- dequantization ------------------------------------------------------------------------------------------------


def _empty_scales(codes: Tensor, codebook: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    return codes.new_empty(codes.numel(), dtype=torch.float32)


@operation(fake=_empty_scales)
def dequantize_8bit(codes: Tensor, codebook: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """Return codebook[code] * absmax of its block for each element.

    Args:
        codes: (numel,) uint8.
        codebook: (256,) fp32.
        absmax: (ceil(numel / block_size),) fp32.
        block_size: elements per block.

    Returns:
        (numel,) fp32.
    """
    return codebook[codes.int()] * absmax.repeat_interleave(block_size)[: codes.numel()]


def _no_result(weight: Weight4bit, out: Tensor) -> None:
    return None


@operation(writes=("out",), fake=_no_result)
def dequantize_4bit_out(weight: Weight4bit, out: Tensor) -> None:
    """Fill `out` with the values of a weight, rounded once from fp32.

    Args:
        weight: the weight.
        out: any shape with as many elements as the weight, contiguous; fp32, bf16 or fp16.
    """
    packed, codebook, absmax, block_size = weight.packed, weight.codebook, weight.absmax, weight.block_size
    if weight.nested:
        nested_codebook, nested_absmax, offset = weight.nested
        absmax = dequantize_8bit.definition(absmax, nested_codebook, nested_absmax, weight.nested_block_size) + offset
    # One look-up per byte: entry b of the table holds the two fp32 values of byte b, read as one 8-byte number.
    byte = torch.arange(256, device=packed.device)
    pairs = torch.stack([codebook[byte >> 4], codebook[byte & 15]], dim=1).view(torch.float64).view(-1)
    source, target, count = packed.reshape(-1), out.view(-1), out.numel()
    in_full_blocks = count // block_size * block_size  # all elements but those of a short last block
    step = max(1, _CHUNK * 2 // block_size) * block_size
    index = torch.empty(min(step, in_full_blocks) // 2, dtype=torch.int32, device=packed.device)
    values = torch.empty(min(step, in_full_blocks) // 2, dtype=torch.float64, device=packed.device)
    for start in range(0, in_full_blocks, step):
        size = min(step, in_full_blocks - start) // 2
        index[:size].copy_(source[start // 2 : start // 2 + size])
        torch.index_select(pairs, 0, index[:size], out=values[:size])
        blocks = values[:size].view(torch.float32).view(-1, block_size)
        blocks.mul_(absmax[start // block_size : start // block_size + len(blocks), None])
        target[start : start + 2 * size].copy_(blocks.view(-1))
    if in_full_blocks < count:
        codes = unpack_4bit(source[in_full_blocks // 2 :], count - in_full_blocks)
        target[in_full_blocks:] = codebook[codes.int()] * absmax[-1]


def _empty_values(weight: Weight4bit, dtype: torch.dtype) -> Tensor:
    return weight.packed.new_empty(list(weight.shape), dtype=dtype)


@operation(fake=_empty_values)
def dequantize_4bit(weight: Weight4bit, dtype: torch.dtype) -> Tensor:
    """Return the values of a weight as a fresh tensor of the weight's shape and `dtype`, rounded once from fp32.

    A backend fills it with `dequantize_4bit_out`.
    """
    out = _empty_values(weight, dtype)
    dequantize_4bit_out(weight, out)
    return out


def _empty_rows(weight: Weight4bit, rows: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.packed.new_empty([*rows.shape, *weight.shape[1:]], dtype=dtype)


@operation(fake=_empty_rows)
def gather_4bit(weight: Weight4bit, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return some rows of a matrix, as an embedding looks them up: `dequantize_4bit(weight, dtype)[rows]`.

    Only these rows are decoded. They are decoded element by element, since blocks run over the flat tensor and may
    straddle rows.

    Args:
        weight: shape (rows, columns).
        rows: (...) int64, row indices.
        dtype: dtype of the result.

    Returns:
        (..., columns), rounded once from fp32.
    """
    columns = weight.shape[1]
    column = torch.arange(columns, device=rows.device)
    element = rows[..., None] * columns + column  # (..., columns), indices into the flat tensor
    byte = weight.packed.reshape(-1)[element // 2]
    code = torch.where(element % 2 == 0, byte >> 4, byte & 15)
    block = element // weight.block_size
    scale = weight.absmax[block]
    if weight.nested:
        codebook, absmax, offset = weight.nested
        scale = codebook[scale.int()] * absmax[block // weight.nested_block_size] + offset
    return (weight.codebook[code.int()] * scale).to(dtype)


def unpack_4bit(packed: Tensor, count: int) -> Tensor:
    """Return the first `count` codes of packed uint8 bytes of any shape: (count,) uint8, 0..15."""
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], dim=1).view(-1)[:count]
