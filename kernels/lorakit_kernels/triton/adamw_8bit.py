"""One step of AdamW with its moments in 8 bits, as `ops.adamw_8bit` defines it.

A program takes four blocks of 256 elements from the codes of their moments to the new codes. It moves 12 to 16 bytes
per element, where fp32 moments move 28. Every operation rounds as the definition's does (quotient and root to nearest,
no fusing of products and sums), so fp32 parameters are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import ASTSource

from ..arguments import readable, writable_moment
from ..operands import AdamWStep, Moment8bit
from ..ops.adamw_8bit import STATE_BLOCK_SIZE
from .launch import on_device_of, source

_BLOCKS = 4  # per program


def adamw_8bit(parameter: Tensor, gradient: Tensor, first: Moment8bit, second: Moment8bit, step: AdamWStep) -> None:
    """See `ops.adamw_8bit.adamw_8bit`.

    Raises:
        ValueError: a tensor has another dtype, size or device than the kernel reads.
    """
    count, device = parameter.numel(), parameter.device
    target = parameter.contiguous()
    gradient = readable("gradient", gradient, parameter.dtype, count, device)
    first, second = (
        writable_moment(name, moment, count, STATE_BLOCK_SIZE, device)
        for name, moment in (("first", first), ("second", second))
    )
    blocks = triton.cdiv(count, STATE_BLOCK_SIZE)
    if count:
        with on_device_of(parameter):
            adamw_8bit_kernel[(triton.cdiv(blocks, _BLOCKS),)](
                target, gradient, first.codes, first.absmax, second.codes, second.absmax,
                first.values, first.boundaries, second.values, second.boundaries,
                step.beta1, 1 - step.beta1, step.beta2, 1 - step.beta2, *step.factors(), step.eps,
                count, blocks, BLOCKS=_BLOCKS, BLOCK=STATE_BLOCK_SIZE, enable_fp_fusion=False,
            )  # fmt: skip
    if target is not parameter:
        parameter.copy_(target)


@triton.jit
def adamw_8bit_kernel(
    parameter: tl.tensor, gradient: tl.tensor,
    first: tl.tensor, first_absmax: tl.tensor, second: tl.tensor, second_absmax: tl.tensor,
    first_values: tl.tensor, first_boundaries: tl.tensor, second_values: tl.tensor, second_boundaries: tl.tensor,
    beta1: tl.tensor, rest1: tl.tensor, beta2: tl.tensor, rest2: tl.tensor,
    keep: tl.tensor, step_size: tl.tensor, root_scale: tl.tensor, eps: tl.tensor, count: tl.tensor, blocks: tl.tensor,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Dequantize, update and quantize BLOCKS blocks; rest is 1 − beta."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    offset = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask, is_block = offset < count, block < blocks
    p = tl.load(parameter + offset, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gradient + offset, mask=mask, other=0.0).to(tl.float32)
    m = _moment(first + offset, first_absmax + block, first_values, mask, is_block)
    v = _moment(second + offset, second_absmax + block, second_values, mask, is_block)
    m = m * beta1 + g * rest1
    v = v * beta2 + g * g * rest2
    change = tl.div_rn(m, tl.sqrt_rn(v) * root_scale + eps)
    tl.store(parameter + offset, p * keep - change * step_size, mask=mask)
    _quantize(m, first + offset, first_absmax + block, first_boundaries, mask, is_block)
    _quantize(v, second + offset, second_absmax + block, second_boundaries, mask, is_block)


@triton.jit
def _moment(
    codes: tl.tensor, absmax: tl.tensor, values: tl.tensor, mask: tl.tensor, is_block: tl.tensor
) -> tl.tensor:  # fmt: skip
    """Return a moment, (blocks, elements) fp32, zero beyond its end."""
    scale = tl.load(absmax, mask=is_block, other=0.0)
    return tl.load(values + tl.load(codes, mask=mask, other=0).to(tl.int32), mask=mask, other=0.0) * scale[:, None]


@triton.jit
def _quantize(
    x: tl.tensor, codes: tl.tensor, absmax: tl.tensor, boundaries: tl.tensor, mask: tl.tensor, is_block: tl.tensor
) -> None:
    """Write the codes, which count the boundaries below x / absmax, and the scales of the blocks."""
    scale = tl.max(tl.abs(x), axis=1)
    scaled = tl.where(x == 0, 0.0, x * tl.div_rn(1.0, scale)[:, None])
    rank = tl.zeros(x.shape, tl.int32)
    for bit in tl.static_range(8):  # binary search among 255 boundaries
        half = 128 >> bit
        rank += tl.where(scaled <= tl.load(boundaries + rank + half - 1), 0, half)
    tl.store(codes, rank.to(tl.uint8), mask=mask)
    tl.store(absmax, scale, mask=is_block)


def sources() -> Iterator[tuple[str, ASTSource]]:
    """Yield the kernel for fp32 and for bf16 parameters."""
    states = {"first": "*u8", "first_absmax": "*fp32", "second": "*u8", "second_absmax": "*fp32"}
    maps = {f"{moment}_{part}": "*fp32" for moment in ("first", "second") for part in ("values", "boundaries")}
    factors = ("beta1", "rest1", "beta2", "rest2", "keep", "step_size", "root_scale", "eps")
    numbers = {**dict.fromkeys(factors, "fp32"), "count": "i32:16", "blocks": "i32"}
    tile = {"BLOCKS": _BLOCKS, "BLOCK": STATE_BLOCK_SIZE}
    for dtype in ("fp32", "bf16"):
        types = {"parameter": f"*{dtype}", "gradient": f"*{dtype}", **states, **maps, **numbers}
        yield f"adamw_8bit {dtype}", source(adamw_8bit_kernel, types, tile)
