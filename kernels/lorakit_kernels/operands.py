"""What the operations take in groups: a weight in 4 bits, a moment in 8 bits, one step of AdamW.

Each is a named tuple: it costs a call no more than a tuple does. `dispatch.operation` flattens it where an operation is
registered, since torch.library knows only tensors, numbers and lists of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Weight4bit(NamedTuple):
    """A weight in 4 bits: value = codebook[code] * absmax of its block, with blocks over the flat tensor.

    Attributes:
        packed: uint8 of any shape, ceil(numel / 2) bytes in row-major order; the even element is in the high nibble.
        codebook: (16,) fp32, by code.
        absmax: (ceil(numel / block_size),) fp32, or the uint8 codes of double-quantized scales.
        block_size: elements per block, even.
        shape: of the values; of a linear layer's weight (out_features, in_features).
        nested: of double-quantized scales, what turns their codes into fp32: codebook (256,), absmax
            (ceil(blocks / nested_block_size),) and offset (), all fp32. A scale is codebook[code] * absmax + offset,
            each result rounded to fp32. Empty where the scales are fp32.
        nested_block_size: scales per nested block; 0 where the scales are fp32.
    """

    packed: Tensor
    codebook: Tensor
    absmax: Tensor
    block_size: int
    shape: Sequence[int]
    nested: Sequence[Tensor] = ()
    nested_block_size: int = 0


class Moment8bit(NamedTuple):
    """A moment of AdamW in 8 bits: value = values[code] * absmax of its block of `adamw_8bit.STATE_BLOCK_SIZE`.

    Attributes:
        codes: (numel,) uint8.
        absmax: (blocks,) fp32.
        values: (256,) fp32, ascending: what the codes stand for.
        boundaries: (255,) fp32, ascending: they separate neighbouring codes.
    """

    codes: Tensor
    absmax: Tensor
    values: Tensor
    boundaries: Tensor


class AdamWStep(NamedTuple):
    """The settings of one step of AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2).

    Attributes:
        lr: the learning rate.
        beta1, beta2: decay rates of the first and the second moment.
        eps: what is added to the root of the second moment.
        weight_decay: decoupled, a share of the learning rate.
        step: t, counted from 1.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int

    def factors(self) -> AdamWFactors:
        """Return what is alike for all elements."""
        return AdamWFactors(
            1 - self.lr * self.weight_decay,
            self.lr / (1 - self.beta1**self.step),
            1 / math.sqrt(1 - self.beta2**self.step),
        )


class AdamWFactors(NamedTuple):
    """The factors of a step that are alike for all elements; they act as fp32 numbers, whatever computes.

    Attributes:
        keep: 1 − lr·weight_decay, of the parameter.
        step_size: lr / (1 − beta1^t).
        root_scale: 1 / sqrt(1 − beta2^t).
    """

    keep: float
    step_size: float
    root_scale: float
