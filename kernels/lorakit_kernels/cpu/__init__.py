"""The operations in C++, for tensors on the CPU: the codec and the optimizer here, what training adds in `elementwise`.

The codec and the optimizer give the results of their definitions, bit for bit. The functions have the definitions'
signatures. They check what C++ cannot see, dtypes and sizes behind the pointers (`arguments`), and hand the pointers
to the library, which `loading` finds and `build` compiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..reference_training import STATE_BLOCK_SIZE, AdamWFactors
from .arguments import DTYPES, at_most, block_count, readable, source, weight, writable
from .build import BuildError
from .elementwise import cross_entropy, drop, rms_norm, rms_norm_backward, rope, swiglu, swiglu_backward
from .linear import add_linear_4bit_dx, linear_4bit, linear_4bit_dx
from .loading import instruction_sets, is_available, library, one_thread, threads

__all__ = [
    "BuildError",
    "adamw_8bit",
    "add_linear_4bit_dx",
    "cross_entropy",
    "dequantize_4bit",
    "dequantize_8bit",
    "drop",
    "instruction_sets",
    "is_available",
    "library",
    "linear_4bit",
    "linear_4bit_dx",
    "one_thread",
    "quantize_4bit",
    "quantize_8bit",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "swiglu",
    "swiglu_backward",
    "threads",
]


def quantize_4bit(x: Tensor, boundaries: Tensor, order: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """See `reference.quantize_4bit`.

    Raises:
        ValueError: a tensor has another dtype, size or device than the operation reads; so for all functions here.
    """
    x, count, steps = source(x), x.numel(), at_most(15, boundaries)
    boundaries = readable("boundaries", boundaries, torch.float32, steps)
    order = readable("order", order, torch.uint8, steps + 1)
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(block_count(count, block_size, even=True), dtype=torch.float32)
    library().quantize_4bit(
        x.data_ptr(), DTYPES[x.dtype], count, block_size, boundaries.data_ptr(), order.data_ptr(), steps,
        packed.data_ptr(), absmax.data_ptr(), *threads(),
    )  # fmt: skip
    return packed, absmax


def quantize_8bit(x: Tensor, boundaries: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """See `reference.quantize_8bit`."""
    x, count, steps = source(x), x.numel(), at_most(255, boundaries)
    boundaries = readable("boundaries", boundaries, torch.float32, steps)
    codes = torch.empty(count, dtype=torch.uint8)
    absmax = torch.empty(block_count(count, block_size), dtype=torch.float32)
    library().quantize_8bit(
        x.data_ptr(), DTYPES[x.dtype], count, block_size, boundaries.data_ptr(), steps,
        codes.data_ptr(), absmax.data_ptr(), *threads(),
    )  # fmt: skip
    return codes, absmax


def dequantize_8bit(codes: Tensor, codebook: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """See `reference.dequantize_8bit`."""
    count = codes.numel()
    codes = readable("codes", codes, torch.uint8, count)
    codebook = readable("codebook", codebook, torch.float32, 256)
    absmax = readable("absmax", absmax, torch.float32, block_count(count, block_size))
    values = torch.empty(count, dtype=torch.float32)
    library().dequantize_8bit(
        codes.data_ptr(), codebook.data_ptr(), absmax.data_ptr(), count, block_size, values.data_ptr(), *threads()
    )
    return values


def dequantize_4bit(
    packed: Tensor,
    codebook: Tensor,
    absmax: Tensor,
    block_size: int,
    out: Tensor,
    nested: Sequence[Tensor] = (),
    nested_block_size: int = 256,
) -> None:
    """See `reference.dequantize_4bit`."""
    if out.dtype not in DTYPES:
        return reference.dequantize_4bit(packed, codebook, absmax, block_size, out, nested, nested_block_size)
    checked = weight(out.numel(), packed, codebook, absmax, block_size, nested, nested_block_size)
    if not out.is_contiguous() or not out.is_cpu:
        raise ValueError("out must be contiguous, on the CPU")
    library().dequantize_4bit(*checked.pointers(), out.numel(), out.data_ptr(), DTYPES[out.dtype], *threads())
    return None


def adamw_8bit(
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    first_absmax: Tensor,
    second: Tensor,
    second_absmax: Tensor,
    first_map: Sequence[Tensor],
    second_map: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """See `reference_training.adamw_8bit`."""
    count, dtype = parameter.numel(), parameter.dtype
    if dtype not in DTYPES:
        raise ValueError(f"parameter must be fp32, bf16 or fp16, got {dtype}")
    blocks = block_count(count, STATE_BLOCK_SIZE)
    parameter = writable("parameter", parameter, dtype, count)
    gradient = readable("gradient", gradient, dtype, count)
    states = [
        writable(name, tensor, wanted, size)
        for name, tensor, wanted, size in (
            ("first", first, torch.uint8, count),
            ("first_absmax", first_absmax, torch.float32, blocks),
            ("second", second, torch.uint8, count),
            ("second_absmax", second_absmax, torch.float32, blocks),
        )
    ]
    maps = [
        readable(name, tensor, torch.float32, size)
        for table in (first_map, second_map)
        for name, tensor, size in zip(("values", "boundaries"), table, (256, 255), strict=True)
    ]
    library().adamw_8bit(
        parameter.data_ptr(), gradient.data_ptr(), DTYPES[dtype], count, *(t.data_ptr() for t in (*states, *maps)),
        beta1, 1 - beta1, beta2, 1 - beta2, *AdamWFactors.of_step(step, lr, beta1, beta2, weight_decay), eps,
        *threads(),
    )  # fmt: skip
