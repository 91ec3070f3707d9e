"""`quantize` and `QuantizedWeight`: a weight in 4 bits, in bitsandbytes' exact layout, open to inspection."""

from __future__ import annotations

import math
from dataclasses import dataclass

import lorakit_kernels as kernels
import torch
from lorakit_kernels import Weight4bit
from torch import Tensor

from ..errors import ConfigError, ShapeError
from .codebooks import codebook
from .quality import QuantizationError, quantization_error
from .scales import NestedScales

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STORAGE_DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedWeight:
    """A tensor in 4-bit codes with one scale per block.

    Attributes:
        packed: uint8, two codes per byte, the even element in the high nibble: (..., in / 2) if the tensor has two or
            more dimensions and the last is even, otherwise (ceil(numel / 2),).
        scales: (blocks,) fp32, or `NestedScales` after double quantization.
        shape: shape of the original tensor.
        dtype: dtype of the original tensor.
        quant_type: name of the codebook, one of `QUANT_TYPES`.
        block_size: elements per block; blocks run over the flat tensor and may straddle rows.
        code_values: (16,) fp32 codebook, by code.
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
        """The scales of the blocks, (ceil(numel / block_size),) fp32, expanded from 8 bits if they are nested."""
        return self.scales[:] if isinstance(self.scales, NestedScales) else self.scales

    @property
    def codes(self) -> Tensor:
        """The codes, one per byte: uint8 of the original shape."""
        return kernels.unpack_4bit(self.packed, self.numel).view(self.shape)

    @property
    def double_quant(self) -> bool:
        """Whether the scales themselves are quantized."""
        return isinstance(self.scales, NestedScales)

    @property
    def numel(self) -> int:
        """The number of elements of the original tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, as a layer holds them in memory."""
        return self.packed.nbytes + self.scales.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per element, scales included: 4.127 for NF4 with double quantization at 64 / 256."""
        return 8 * self.nbytes / max(1, self.numel)

    def stored(self, dtype: torch.dtype) -> Tensor:
        """Return the packed bytes viewed as another dtype, (bytes / itemsize,), for FSDP1. No copy is made.

        Raises:
            ShapeError: the dtype is not uint8, bf16, fp16 or fp32, or the bytes do not divide into its elements.
        """
        if dtype not in STORAGE_DTYPES:
            raise ShapeError(f"storage dtype {dtype} is not one of {', '.join(map(str, STORAGE_DTYPES))}")
        if self.packed.numel() % dtype.itemsize:
            raise ShapeError(
                f"{self.packed.numel()} packed bytes of a weight of shape {tuple(self.shape)} do not divide into "
                f"elements of {dtype}; store it as uint8"
            )
        return self.packed.reshape(-1).view(dtype)

    def dequantize(
        self, dtype: torch.dtype | None = None, out: Tensor | None = None, rows: slice | None = None
    ) -> Tensor:
        """Return the values, codebook[code] * absmax in fp32, rounded once to the dtype of the result.

        Args:
            dtype: dtype of the result; None: the original dtype.
            out: a contiguous tensor of the result's shape to fill; its dtype overrides `dtype`.
            rows: return only these rows of the first dimension, with step 1; no other block is computed.

        Raises:
            ShapeError: `out` has another shape or is not contiguous, or `rows` has a step.
        """
        if rows is not None:
            values = self._rows(rows, dtype or self.dtype)
            return values if out is None else _checked_out(out, values.shape).copy_(values)
        if out is None:
            return kernels.dequantize_4bit(self.operand, dtype or self.dtype)
        kernels.dequantize_4bit_out(self.operand, _checked_out(out, self.shape))
        return out

    def gather(self, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the rows with these indices: bit for bit `dequantize(dtype)[ids]`, with no other row decoded.

        Args:
            ids: (...) int64, from 0 to below the number of rows.
            dtype: dtype of the result; None: the original dtype.

        Returns:
            (..., columns) for a weight of shape (rows, columns).

        Raises:
            ShapeError: the weight is not two-dimensional.
        """
        if len(self.shape) != 2:
            raise ShapeError(f"gather needs a weight of two dimensions, got shape {tuple(self.shape)}")
        return kernels.gather_4bit(self.operand, ids, dtype or self.dtype)

    @property
    def operand(self) -> Weight4bit:
        """The weight as the kernels take it."""
        scales = self.scales
        if not isinstance(scales, NestedScales):
            return Weight4bit(self.packed, self.code_values, scales, self.block_size, self.shape)
        nested = [scales.code_values, scales.absmax, scales.offset]
        return Weight4bit(
            self.packed, self.code_values, scales.codes, self.block_size, self.shape, nested, scales.block_size
        )

    def _rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Dequantize the blocks that hold the rows, and cut the rows out of them."""
        if not self.shape:
            raise ShapeError("a weight without dimensions has no rows")
        first, last, step = rows.indices(self.shape[0])
        if step != 1:
            raise ShapeError(f"rows must be consecutive, got a step of {step}")
        width = math.prod(self.shape[1:])
        start, stop = first * width, max(first, last) * width
        block, end = start // self.block_size, -(-stop // self.block_size)
        origin = block * self.block_size
        count = min(end * self.block_size, self.numel) - origin if stop > start else 0
        packed = self.packed.reshape(-1)[origin // 2 : (origin + count + 1) // 2]
        touched = Weight4bit(packed, self.code_values, self.scales[block:end], self.block_size, (count,))
        flat = kernels.dequantize_4bit(touched, dtype)
        return flat[start - origin : stop - origin].reshape(max(0, last - first), *self.shape[1:])

    def error(self, reference: Tensor) -> QuantizationError:
        """Return the error of the values against `reference`, a tensor of the same shape."""
        return quantization_error(self.dequantize(torch.float32), reference)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """Return the same weight on another device."""
        return QuantizedWeight(
            self.packed.to(device), self.scales.to(device), self.shape, self.dtype, self.quant_type, self.block_size,
            self.code_values.to(device),
        )  # fmt: skip

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
        weight: any shape; fp32, bf16 or fp16. It stays unchanged.
        quant_type: name of the codebook, one of `QUANT_TYPES`, such as "nf4".
        block_size: elements that share a scale, one of 32, 64, ..., 4096.
        double_quant: store the scales themselves in 8 bits.

    Raises:
        ShapeError: the dtype is not a supported floating type, or a value is inf or nan.
        ConfigError: an unknown quant_type or block_size.
    """
    check_block_size(block_size)
    book = codebook(quant_type, block_size)
    if weight.dtype not in SOURCE_DTYPES:
        raise ShapeError(f"cannot quantize a tensor of {weight.dtype}; expected float32, bfloat16 or float16")
    device = weight.device
    packed, absmax = kernels.quantize_4bit(
        weight.detach(), book.boundaries.to(device), book.order.to(device), block_size
    )
    return assemble(
        packed, absmax, weight.shape, weight.dtype,
        quant_type=quant_type, block_size=block_size, double_quant=double_quant,
    )  # fmt: skip


def assemble(
    packed: Tensor,
    absmax: Tensor,
    shape: torch.Size,
    dtype: torch.dtype,
    *,
    quant_type: str,
    block_size: int,
    double_quant: bool,
) -> QuantizedWeight:
    """Return a weight made of packed uint8 codes (ceil(numel / 2),) and fp32 scales (blocks,).

    Args:
        packed, absmax: codes and scales, as from `lorakit_kernels.quantize_4bit`.
        shape, dtype: shape and dtype of the original tensor.
        quant_type, block_size: how it was quantized.
        double_quant: quantize the scales too.

    Raises:
        ShapeError: a scale is inf or nan, because the weight holds inf or nan.
    """
    if not torch.isfinite(absmax).all():
        block = int((~torch.isfinite(absmax)).nonzero()[0])
        where = f"elements {block * block_size} to {(block + 1) * block_size - 1} of the flat tensor"
        raise ShapeError(f"cannot quantize a weight of shape {tuple(shape)} with inf or nan among {where}")
    if len(shape) > 1 and shape[-1] % 2 == 0:
        packed = packed.view(*shape[:-1], shape[-1] // 2)
    scales = NestedScales.quantize(absmax) if double_quant else absmax
    values = codebook(quant_type, block_size).values.to(packed.device)
    return QuantizedWeight(packed, scales, shape, dtype, quant_type, block_size, values)


def check_block_size(block_size: int) -> None:
    """Raise ConfigError unless the block size is one of `BLOCK_SIZES`."""
    if block_size not in BLOCK_SIZES:
        raise ConfigError(f"block_size {block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}")


def _checked_out(out: Tensor, shape: torch.Size) -> Tensor:
    if out.shape != shape or not out.is_contiguous():
        raise ShapeError(f"out must be contiguous with shape {tuple(shape)}, got {tuple(out.shape)}")
    return out
