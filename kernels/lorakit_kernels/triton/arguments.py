"""A 4-bit weight as the Triton kernels take it, beyond the checks that all backends share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..arguments import readable_weight
from ..operands import Weight4bit


class KernelWeight(NamedTuple):
    """A checked 4-bit weight as the kernels take it.

    Attributes:
        words: (ceil(numel / 8),) int32, eight codes each.
        codebook: (16,) fp32.
        absmax: (blocks,) fp32, or uint8 codes if the scales are nested.
        nested_codebook, nested_absmax, nested_offset: (256,), (nested blocks,) and () fp32; None if not nested.
        nested_block_size: scales per nested block; 0 if not nested.
        block_size: elements per block.
    """

    words: Tensor
    codebook: Tensor
    absmax: Tensor
    nested_codebook: Tensor | None
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    nested_block_size: int
    block_size: int

    @staticmethod
    def of(weight: Weight4bit, count: int, device: torch.device) -> KernelWeight:
        """Return a weight of `count` elements for the kernels.

        Raises:
            ValueError: one of its tensors has another dtype, size or device.
        """
        packed, codebook, absmax, block_size, _, nested, nested_block_size = readable_weight(weight, count, device)
        nested_codebook, nested_absmax, nested_offset = nested or (None, None, None)
        return KernelWeight(
            _words(packed, count), codebook, absmax, nested_codebook, nested_absmax, nested_offset,
            nested_block_size if nested else 0, block_size,
        )  # fmt: skip

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return the tensors in the order of the kernels' arguments."""
        return self[:6]

    def has_one_scale(self, columns: int, step: int) -> bool:
        """Return whether `step` columns of a row, starting at a multiple of `step`, always lie in one block."""
        return columns % self.block_size == 0 and self.block_size % step == 0


def _words(packed: Tensor, count: int) -> Tensor:
    """Return packed codes as (ceil(count / 8),) int32; a copy if the bytes are not whole, aligned words."""
    size, needed = (count + 1) // 2, -(-count // 8) * 4
    flat = packed.view(-1)[:size]
    if size < needed:
        flat = pad(flat, (0, needed - size))
    elif flat.data_ptr() % 4:
        flat = flat.clone()
    return flat.view(torch.int32)
