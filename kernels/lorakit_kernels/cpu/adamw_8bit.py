"""A step of AdamW with 8-bit moments in C++, bit for bit as `ops.adamw_8bit` defines it."""

from __future__ import annotations

from torch import Tensor

from ..arguments import readable, writable, writable_moment
from ..operands import AdamWStep, Moment8bit
from ..ops.adamw_8bit import STATE_BLOCK_SIZE
from .loading import CPU, DTYPES, library, threads


def adamw_8bit(parameter: Tensor, gradient: Tensor, first: Moment8bit, second: Moment8bit, step: AdamWStep) -> None:
    """See `ops.adamw_8bit.adamw_8bit`.

    Raises:
        ValueError: a tensor has another dtype, size or device than C++ reads and writes.
    """
    count, dtype = parameter.numel(), parameter.dtype
    if dtype not in DTYPES:
        raise ValueError(f"parameter must be fp32, bf16 or fp16, got {dtype}")
    target = writable("parameter", parameter.contiguous(), dtype, count, CPU)
    gradient = readable("gradient", gradient, dtype, count, CPU)
    first, second = (
        writable_moment(name, moment, count, STATE_BLOCK_SIZE, CPU)
        for name, moment in (("first", first), ("second", second))
    )
    moments = first.codes, first.absmax, second.codes, second.absmax
    tables = first.values, first.boundaries, second.values, second.boundaries
    library().adamw_8bit(
        target.data_ptr(), gradient.data_ptr(), DTYPES[dtype], count, *(t.data_ptr() for t in (*moments, *tables)),
        step.beta1, 1 - step.beta1, step.beta2, 1 - step.beta2, *step.factors(), step.eps, *threads(),
    )  # fmt: skip
    if target is not parameter:
        parameter.copy_(target)
