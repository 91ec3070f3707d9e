"""Double quantization: the scales of the blocks in 8 bits (QLoRA, arXiv:2305.14314, section 3).

The mean of the fp32 scales is subtracted, and the remainders are quantized in blocks of 256 with the dynamic map:

    absmax = dynamic[code] * nested_absmax + offset

The product and the sum are each rounded to fp32. The mean is taken in fp64, so that it depends only on its input and
not on the order in which a device adds.
"""

from __future__ import annotations

from dataclasses import dataclass

import lorakit_kernels as kernels
import torch
from torch import Tensor

from .codebooks import dynamic_map

NESTED_BLOCK_SIZE = 256


@dataclass(frozen=True, eq=False)
class NestedScales:
    """The scales of the blocks in 8 bits.

    Attributes:
        codes: (blocks,) uint8, indices into the dynamic map.
        absmax: (ceil(blocks / block_size),) fp32.
        offset: () fp32, the mean of the scales.
        code_values: (256,) fp32, the dynamic map.
        block_size: scales per nested block.
    """

    codes: Tensor
    absmax: Tensor
    offset: Tensor
    code_values: Tensor
    block_size: int = NESTED_BLOCK_SIZE

    @staticmethod
    def quantize(absmax: Tensor) -> NestedScales:
        """Quantize fp32 scales (blocks,) to 8 bits."""
        table = dynamic_map()
        mean = absmax.double().mean() if absmax.numel() else absmax.new_zeros((), dtype=torch.float64)
        offset = mean.float()
        boundaries = table.boundaries.to(absmax.device)
        codes, nested = kernels.quantize_8bit(absmax - offset, boundaries, NESTED_BLOCK_SIZE)
        return NestedScales(codes, nested, offset, table.values.to(absmax.device))

    def __getitem__(self, blocks: slice) -> Tensor:
        """Return the scales of consecutive blocks, (blocks,) fp32."""
        first, last, _ = blocks.indices(len(self.codes))
        start, stop = first // self.block_size, -(-last // self.block_size)  # the nested blocks that hold them
        origin = start * self.block_size
        scaled: Tensor = kernels.dequantize_8bit(
            self.codes[origin:last], self.code_values, self.absmax[start:stop], self.block_size
        )
        return scaled[first - origin :] + self.offset

    def to(self, device: torch.device | str) -> NestedScales:
        """Return the same scales on another device."""
        codes, absmax, offset = self.codes.to(device), self.absmax.to(device), self.offset.to(device)
        return NestedScales(codes, absmax, offset, self.code_values.to(device), self.block_size)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, nested scales and offset. The dynamic map is a constant and does not count."""
        return self.codes.nbytes + self.absmax.nbytes + self.offset.nbytes
