"""The arguments of operations that are records: a 4-bit weight, an 8-bit moment, one step of AdamW.

Each is a named tuple, which costs a call no more than a tuple does. `dispatch.operation` flattens it for registration,
since torch.library knows only tensors, numbers and lists of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Weight4bit(NamedTuple):
    """A 4-bit weight: value = codebook[code] * absmax of its block. Blocks run over the flat tensor.

    Attributes:
        packed: uint8 of any shape, ceil(numel / 2) bytes in row-major order; the even element is in the high nibble.
        codebook: (16,) fp32, by code.
        absmax: (ceil(numel / block_size),) fp32, or the uint8 codes of double-quantized scales.
        block_size: elements per block, even.
        shape: shape of the values; (out_features, in_features) for a linear layer.
        nested: with double quantization, the fp32 tensors that decode the scales: codebook (256,), absmax
            (ceil(blocks / nested_block_size),) and offset (). A scale is codebook[code] * absmax + offset, each result
            rounded to fp32. Empty if the scales are fp32.
        nested_block_size: scales per nested block; 0 if the scales are fp32.
    """

    packed: Tensor
    codebook: Tensor
    absmax: Tensor
    block_size: int
    shape: Sequence[int]
    nested: Sequence[Tensor] = ()
    nested_block_size: int = 0


class Moment8bit(NamedTuple):
    """An 8-bit moment of AdamW: value = values[code] * absmax of its block of `adamw_8bit.STATE_BLOCK_SIZE`.

    Attributes:
        codes: (numel,) uint8.
        absmax: (blocks,) fp32.
        values: (256,) fp32, ascending: the codebook.
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
        eps: added to the root of the second moment.
        weight_decay: decoupled; multiplied by the learning rate.
        step: t, counted from 1.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int

    def factors(self) -> AdamWFactors:
        """Return the factors that all elements share."""
        return AdamWFactors(
            1 - self.lr * self.weight_decay,
            self.lr / (1 - self.beta1**self.step),
            1 / math.sqrt(1 - self.beta2**self.step),
        )


class AdamWFactors(NamedTuple):
    """The factors of a step that all elements share. Every backend uses them as fp32 numbers.

    Attributes:
        keep: 1 − lr·weight_decay, which multiplies the parameter.
        step_size: lr / (1 − beta1^t).
        root_scale: 1 / sqrt(1 − beta2^t).
    """

    keep: float
    step_size: float
    root_scale: float
