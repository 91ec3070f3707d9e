"""`quantize` and `QuantizedWeight`: a weight in 4 bits, exactly as bitsandbytes lays it out, open to inspection.

Double quantization (QLoRA, arXiv:2305.14314, section 3) stores the fp32 scales of the blocks in 8 bits: their mean is
taken off, the rest is quantized in blocks of 256 with the dynamic map, and

    absmax = dynamic[code] * nested_absmax + offset

with the product and the sum each rounded to fp32. The mean is taken in fp64, so that it depends on its input alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from lorakit_kernels import reference
from torch import Tensor

from ..errors import ConfigError, ShapeError
from .codebooks import codebook, dynamic_map

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256


@dataclass(frozen=True, eq=False)
class NestedScales:
    """The scales of the blocks in 8 bits, as double quantization stores them.

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
        codes, nested = reference.quantize_blockwise(absmax - offset, boundaries, NESTED_BLOCK_SIZE)
        return NestedScales(codes, nested, offset, table.values.to(absmax.device))

    def dequantize(self) -> Tensor:
        """Return the scales, (blocks,) fp32."""
        return reference.dequantize_blockwise(self.codes, self.code_values, self.absmax, self.block_size) + self.offset

    @property
    def nbytes(self) -> int:
        """Bytes of codes, nested scales and offset; the dynamic map is a constant and not counted."""
        return self.codes.nbytes + self.absmax.nbytes + self.offset.nbytes


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedWeight:
    """A tensor in 4-bit codes with one scale a block.

    Attributes:
        packed: uint8, two codes a byte, the even element in the high nibble: (..., in / 2) where the last dimension is
            even, else (ceil(numel / 2),).
        scales: (blocks,) fp32, or `NestedScales` after double quantization.
        shape: of the original tensor.
        dtype: of the original tensor.
        quant_type: "nf4".
        block_size: elements a block; blocks run over the flat tensor and may straddle rows.
        code_values: (16,) fp32 codebook.
    """

    packed: Tensor
    scales: Tensor | NestedScales
    shape: torch.Size
    dtype: torch.dtype
    quant_type: str
    block_size: int
    code_values: Tensor

    @property
    def absmax(self) -> Tensor:
        """The scales of the blocks, (ceil(numel / block_size),) fp32, expanded from 8 bits where they are nested."""
        return self.scales.dequantize() if isinstance(self.scales, NestedScales) else self.scales

    @property
    def double_quant(self) -> bool:
        """Whether the scales themselves are quantized."""
        return isinstance(self.scales, NestedScales)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, which is what a layer holds in memory."""
        return self.packed.nbytes + self.scales.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per element, scales included: 4.127 for NF4 with double quantization at 64 / 256."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """Return the values, codebook[code] * absmax in fp32, rounded once to `dtype` (default: the original dtype).

        Args:
            out: a contiguous tensor of `shape` to fill; its dtype wins over `dtype`.

        Raises:
            ShapeError: `out` has another shape or is not contiguous.
        """
        if out is None:
            out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.packed.device)
        elif out.shape != self.shape or not out.is_contiguous():
            raise ShapeError(f"out must be contiguous with shape {tuple(self.shape)}, got {tuple(out.shape)}")
        return reference.dequantize_4bit(self.packed, self.code_values, self.absmax, self.block_size, out)

    def __repr__(self) -> str:
        scales = "8-bit scales" if self.double_quant else "fp32 scales"
        return (
            f"QuantizedWeight({self.quant_type}, shape={tuple(self.shape)}, dtype={str(self.dtype)[6:]}, "
            f"block_size={self.block_size}, {scales}, {self.bits_per_weight:.3f} bits/weight, {self.nbytes:,} bytes)"
        )


def quantize(
    weight: Tensor, quant_type: str = "nf4", block_size: int = 64, double_quant: bool = True
) -> QuantizedWeight:
    """Quantize a weight to 4 bits (QLoRA, arXiv:2305.14314, section 3), block by block over the flat tensor.

    Args:
        weight: any shape; fp32, bf16 or fp16. It is not changed.
        quant_type: "nf4".
        block_size: elements that share a scale, one of 32, 64, ..., 4096.
        double_quant: store the scales themselves in 8 bits.

    Raises:
        ShapeError: the dtype is not a supported floating type, or a value is inf or nan.
        ConfigError: an unknown quant_type or block_size.
    """
    book = codebook(quant_type)
    if block_size not in BLOCK_SIZES:
        raise ConfigError(f"block_size {block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ShapeError(f"cannot quantize a tensor of {weight.dtype}; expected float32, bfloat16 or float16")
    weight = weight.detach()
    codes, absmax = reference.quantize_blockwise(weight, book.boundaries.to(weight.device), block_size)
    if not torch.isfinite(absmax).all():
        block = int((~torch.isfinite(absmax)).nonzero()[0])
        where = f"elements {block * block_size} to {(block + 1) * block_size - 1} of the flat tensor"
        raise ShapeError(f"cannot quantize a weight of shape {tuple(weight.shape)} with inf or nan among {where}")
    packed = reference.pack_4bit(codes, book.zero)
    if weight.dim() > 1 and weight.shape[-1] % 2 == 0:
        packed = packed.view(*weight.shape[:-1], weight.shape[-1] // 2)
    scales = NestedScales.quantize(absmax) if double_quant else absmax
    return QuantizedWeight(
        packed, scales, weight.shape, weight.dtype, quant_type, block_size, book.values.to(weight.device)
    )
