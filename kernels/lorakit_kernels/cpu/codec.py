"""The codecs in C++, bit for bit as `ops.codec` defines them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import block_count, boundary_count, readable, readable_source, readable_weight
from ..operands import Weight4bit
from ..ops import codec as definition
from .loading import CPU, DTYPES, library, pointers, threads


def quantize_4bit(x: Tensor, boundaries: Tensor, order: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """See `ops.codec.quantize_4bit`.

    Raises:
        ValueError: a tensor has another dtype, size or device than the operation reads. All functions here raise this.
    """
    x, count, steps = readable_source(x, CPU), x.numel(), boundary_count(boundaries, 15)
    boundaries = readable("boundaries", boundaries, torch.float32, steps, CPU)
    order = readable("order", order, torch.uint8, steps + 1, CPU)
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(block_count(count, block_size, even=True), dtype=torch.float32)
    library().quantize_4bit(
        x.data_ptr(), DTYPES[x.dtype], count, block_size, boundaries.data_ptr(), order.data_ptr(), steps,
        packed.data_ptr(), absmax.data_ptr(), *threads(),
    )  # fmt: skip
    return packed, absmax


def quantize_8bit(x: Tensor, boundaries: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """See `ops.codec.quantize_8bit`."""
    x, count, steps = readable_source(x, CPU), x.numel(), boundary_count(boundaries, 255)
    boundaries = readable("boundaries", boundaries, torch.float32, steps, CPU)
    codes = torch.empty(count, dtype=torch.uint8)
    absmax = torch.empty(block_count(count, block_size), dtype=torch.float32)
    library().quantize_8bit(
        x.data_ptr(), DTYPES[x.dtype], count, block_size, boundaries.data_ptr(), steps,
        codes.data_ptr(), absmax.data_ptr(), *threads(),
    )  # fmt: skip
    return codes, absmax


def dequantize_8bit(codes: Tensor, codebook: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """See `ops.codec.dequantize_8bit`."""
    count = codes.numel()
    codes = readable("codes", codes, torch.uint8, count, CPU)
    codebook = readable("codebook", codebook, torch.float32, 256, CPU)
    absmax = readable("absmax", absmax, torch.float32, block_count(count, block_size), CPU)
    values = torch.empty(count, dtype=torch.float32)
    library().dequantize_8bit(
        codes.data_ptr(), codebook.data_ptr(), absmax.data_ptr(), count, block_size, values.data_ptr(), *threads()
    )
    return values


def dequantize_4bit_out(weight: Weight4bit, out: Tensor) -> None:
    """See `ops.codec.dequantize_4bit_out`."""
    if out.dtype not in DTYPES:
        return definition.dequantize_4bit_out.definition(weight, out)
    weight = readable_weight(weight, out.numel(), CPU)
    if not out.is_contiguous() or not out.is_cpu:
        raise ValueError("out must be contiguous, on the CPU")
    library().dequantize_4bit(*pointers(weight), out.numel(), out.data_ptr(), DTYPES[out.dtype], *threads())
    return None
