"""The definition of every operation, in plain PyTorch: the oracle that other backends must match bit for bit.

Block-wise quantization (Dettmers et al. 2023, arXiv:2305.14314, eq. 1-2). A tensor is read flat, in row-major order, in
blocks of `block_size` elements, the last of which may be short. Per block, all in fp32:

    absmax = max |x|        s = x * (1 / absmax)        code = order[number of boundaries strictly below s]

so a tie goes to the lower value. An element that is zero has s = 0, also in a block whose absmax is zero or so small
that its reciprocal overflows. The inverse is codebook[code] * absmax, rounded once to the output dtype.

Four-bit codes are packed two to a byte, the even element in the high nibble; an odd count is padded with the code of 0.
The work goes in chunks that stay in the cache, through buffers that are reused: seven times faster than one pass over
a 4096x4096 matrix, since fresh buffers of that size cost more in page faults than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

_CHUNK = 1 << 18  # bytes of packed codes per chunk; measured best of 2^14 .. 2^20 on a 1 MiB L2 cache


def quantize_4bit(x: Tensor, boundaries: Tensor, order: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return packed 4-bit codes and scales of `x`.

    Args:
        x: any shape, fp32, bf16 or fp16; read flat.
        boundaries: (distinct - 1,) fp32, ascending: the values that separate neighbouring codes.
        order: (distinct,) uint8: the codes in ascending order of their values.
        block_size: elements per block, even.

    Returns:
        packed (ceil(numel / 2),) uint8 and absmax (ceil(numel / block_size),) fp32.
    """
    flat, count = x.reshape(-1), x.numel()
    packed = torch.empty(-(-count // 2), dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-count // block_size), dtype=torch.float32, device=x.device)
    step = max(1, _CHUNK // block_size) * block_size
    for start in range(0, count, step):
        codes, scale = quantize_8bit(flat[start : start + step], boundaries, block_size)
        codes = order[pad(codes, (0, len(codes) % 2), value=_zero_bucket(boundaries)).int()]
        packed[start // 2 : (start + len(codes)) // 2] = codes[0::2] << 4 | codes[1::2]
        absmax[start // block_size : start // block_size + len(scale)] = scale
    return packed, absmax


def quantize_8bit(x: Tensor, boundaries: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return codes (numel,) uint8 and absmax (ceil(numel / block_size),) fp32 of `x`, for an ascending codebook."""
    blocks = pad(x.reshape(-1).float(), (0, -x.numel() % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    scaled = torch.where(blocks == 0, 0.0, blocks * absmax.reciprocal()[:, None])
    codes = torch.bucketize(scaled, boundaries, out_int32=True).to(torch.uint8)
    return codes.view(-1)[: x.numel()], absmax


def dequantize_8bit(codes: Tensor, codebook: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """Return codebook[codes] * absmax of each element's block: (numel,) fp32 from (numel,) uint8 codes."""
    return codebook[codes.int()] * absmax.repeat_interleave(block_size)[: codes.numel()]


def dequantize_4bit(
    packed: Tensor,
    codebook: Tensor,
    absmax: Tensor,
    block_size: int,
    out: Tensor,
    nested: Sequence[Tensor] = (),
    nested_block_size: int = 256,
) -> None:
    """Fill `out` with the values of packed 4-bit codes.

    Args:
        packed: uint8 of any shape, ceil(numel / 2) bytes in row-major order.
        codebook: (16,) fp32.
        absmax: (ceil(numel / block_size),) fp32, or uint8 codes with `nested`.
        block_size: elements per block, even.
        out: any shape, contiguous; receives numel values, rounded once from fp32 to its dtype.
        nested: of double-quantized scales, what turns their codes into fp32: codebook (256,), absmax
            (ceil(blocks / nested_block_size),) and offset (), all fp32. A scale is codebook[code] * absmax + offset,
            each result rounded to fp32.
        nested_block_size: scales per nested block.
    """
    if nested:
        nested_codebook, nested_absmax, offset = nested
        absmax = dequantize_8bit(absmax, nested_codebook, nested_absmax, nested_block_size) + offset
    # One look-up per byte: entry b of the table holds the two fp32 values of byte b, read as one 8-byte number.
    byte = torch.arange(256, device=packed.device)
    pairs = torch.stack([codebook[byte >> 4], codebook[byte & 15]], dim=1).view(torch.float64).view(-1)
    source, target, count = packed.reshape(-1), out.view(-1), out.numel()
    whole = count // block_size * block_size  # all but a short last block
    step = max(1, _CHUNK * 2 // block_size) * block_size
    index = torch.empty(min(step, whole) // 2, dtype=torch.int32, device=packed.device)
    values = torch.empty(min(step, whole) // 2, dtype=torch.float64, device=packed.device)
    for start in range(0, whole, step):
        size = min(step, whole - start) // 2
        index[:size].copy_(source[start // 2 : start // 2 + size])
        torch.index_select(pairs, 0, index[:size], out=values[:size])
        blocks = values[:size].view(torch.float32).view(-1, block_size)
        blocks.mul_(absmax[start // block_size : start // block_size + len(blocks), None])
        target[start : start + 2 * size].copy_(blocks.view(-1))
    if whole < count:
        target[whole:] = codebook[unpack_4bit(source[whole // 2 :], count - whole).int()] * absmax[-1]


def linear_4bit(
    x: Tensor,
    packed: Tensor,
    codebook: Tensor,
    absmax: Tensor,
    block_size: int,
    shape: Sequence[int],
    nested: Sequence[Tensor] = (),
    nested_block_size: int = 256,
    bias: Tensor | None = None,
    lora: Sequence[Tensor] = (),
    scaling: float = 1.0,
) -> Tensor:
    """Return y = x W^T + bias + scaling u B^T, W being the weight's values in x's dtype.

    Backends differ in the order in which they add, and in whether the sum of the products is rounded before the rest is
    added; they all accumulate products in fp32.

    Args:
        x: (..., in_features) fp32, bf16 or fp16.
        packed, codebook, absmax, block_size, nested, nested_block_size: of the weight, as of `dequantize_4bit`.
        shape: of the weight: out_features, in_features.
        bias: (out_features,) of x's dtype.
        lora: of an adapter, what its update takes: u = x A^T (..., r) and B (out_features, r), of x's dtype.
        scaling: of the update.

    Returns:
        (..., out_features) of x's dtype.
    """
    weight = torch.empty(list(shape), dtype=x.dtype, device=x.device)
    dequantize_4bit(packed, codebook, absmax, block_size, weight, nested, nested_block_size)
    return dense_linear(x, weight, bias, lora, scaling)


def dense_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, lora: Sequence[Tensor] = (), scaling: float = 1.0
) -> Tensor:
    """Return `linear_4bit` of values, (out_features, in_features) of x's dtype."""
    y = linear(x, weight, bias)
    if lora:
        u, lora_b = lora
        y = torch.addmm(y.flatten(0, -2), u.flatten(0, -2), lora_b.T, alpha=scaling).view(y.shape)
    return y


def linear_4bit_dx(
    dy: Tensor,
    packed: Tensor,
    codebook: Tensor,
    absmax: Tensor,
    block_size: int,
    shape: Sequence[int],
    nested: Sequence[Tensor] = (),
    nested_block_size: int = 256,
    lora: Sequence[Tensor] = (),
) -> Tensor:
    """Return dx = dy W + t A, the gradient of `linear_4bit` by its input; rounding as there.

    Args:
        dy: (..., out_features) fp32, bf16 or fp16.
        packed, codebook, absmax, block_size, nested, nested_block_size: of the weight, as of `dequantize_4bit`.
        shape: of the weight: out_features, in_features.
        lora: of an adapter: t = scaling dy B (..., r) and A (r, in_features), of dy's dtype.

    Returns:
        (..., in_features) of dy's dtype.
    """
    weight = torch.empty(list(shape), dtype=dy.dtype, device=dy.device)
    dequantize_4bit(packed, codebook, absmax, block_size, weight, nested, nested_block_size)
    return dense_linear_dx(dy, weight, lora)


def add_linear_4bit_dx(
    dx: Tensor,
    dy: Tensor,
    packed: Tensor,
    codebook: Tensor,
    absmax: Tensor,
    block_size: int,
    shape: Sequence[int],
    nested: Sequence[Tensor] = (),
    nested_block_size: int = 256,
) -> None:
    """Add dy W to dx, (..., in_features), contiguous, of dy's dtype: for layers that read the same x."""
    dx += linear_4bit_dx(dy, packed, codebook, absmax, block_size, shape, nested, nested_block_size)


def dense_linear_dx(dy: Tensor, weight: Tensor, lora: Sequence[Tensor] = ()) -> Tensor:
    """Return `linear_4bit_dx` of values, (out_features, in_features) of dy's dtype."""
    dx = dy @ weight
    if lora:
        t, lora_a = lora
        dx = torch.addmm(dx.flatten(0, -2), t.flatten(0, -2), lora_a).view(dx.shape)
    return dx


def unpack_4bit(packed: Tensor, count: int) -> Tensor:
    """Return the first `count` codes (uint8, 0..15) of packed bytes."""
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], dim=1).view(-1)[:count]


def _zero_bucket(boundaries: Tensor) -> int:
    """Return how many boundaries are strictly below zero."""
    return int((boundaries < 0).sum())
