"""The base class of layers with a 4-bit weight: their tensors, and the guarantee that nothing changes their bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self, cast

import torch
from lorakit_kernels import Weight4bit
from torch import Tensor, nn

from ...errors import ShapeError
from ...quantization import NestedScales, QuantizedWeight


class QuantizedModule(nn.Module):
    """A module that holds one quantized matrix in plain tensors.

    Codes and scales are registered as parameters without gradient, so that they are moved, saved and sharded like any
    other. Nothing (eval, `.to(dtype)`, saving) changes their bytes.

    Attributes:
        packed: (rows, columns / 2) uint8, or the same bytes as a flat tensor of `storage_dtype`.
        absmax: (blocks,) fp32, or (blocks,) uint8 codes of the nested scales.
        nested_absmax, nested_offset, nested_code_values: with double quantization; see `NestedScales`.
        code_values: (16,) fp32.

    Raises:
        ShapeError: the weight is not two-dimensional, or its bytes do not fit the storage dtype.
    """

    def __init__(self, weight: QuantizedWeight, storage_dtype: torch.dtype = torch.uint8) -> None:
        super().__init__()
        if len(weight.shape) != 2:
            name = type(self).__name__
            raise ShapeError(f"{name} needs a weight of two dimensions, got shape {tuple(weight.shape)}")
        self.weight_shape, self.source_dtype = weight.shape, weight.dtype
        self.quant_type, self.block_size = weight.quant_type, weight.block_size
        self._packed_shape = weight.packed.shape
        self.packed = frozen(weight.packed if storage_dtype == torch.uint8 else weight.stored(storage_dtype))
        # Cloned, since all layers would otherwise share the library's table. A write to one would change the codebook,
        # and safetensors refuses to save tensors that share memory.
        self.code_values = frozen(weight.code_values.clone())
        if isinstance(weight.scales, NestedScales):
            self.nested_block_size = weight.scales.block_size
            self.absmax = frozen(weight.scales.codes)
            self.nested_absmax = frozen(weight.scales.absmax)
            self.nested_offset = frozen(weight.scales.offset)
            self.nested_code_values = frozen(weight.scales.code_values.clone())
        else:
            self.nested_block_size = 0
            self.absmax = frozen(weight.scales)

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight as a `QuantizedWeight` that shares this layer's tensors."""
        weight = self.operand
        scales: Tensor | NestedScales = weight.absmax
        if weight.nested:
            code_values, absmax, offset = weight.nested
            scales = NestedScales(weight.absmax, absmax, offset, code_values, weight.nested_block_size)
        return QuantizedWeight(
            weight.packed, scales, self.weight_shape, self.source_dtype, self.quant_type, weight.block_size,
            weight.codebook,
        )  # fmt: skip

    def dense_weight(self, dtype: torch.dtype, rows: slice | None = None) -> Tensor:
        """Return the dequantized weight, or some of its rows, as a fresh tensor (rows, columns) in `dtype`."""
        return self.quantized.dequantize(dtype, rows=rows)

    @property
    def operand(self) -> Weight4bit:
        """The weight as the kernels take it; see `QuantizedWeight.operand`."""
        # Reading them as attributes takes 5 µs, a tenth of a small layer's time.
        tensors = cast(dict[str, Tensor], self._parameters)
        packed, code_values, absmax = tensors["packed"], tensors["code_values"], tensors["absmax"]
        nested: list[Tensor] = []
        if self.nested_block_size:
            nested = [tensors[name] for name in ("nested_code_values", "nested_absmax", "nested_offset")]
        if packed.dtype != torch.uint8:
            packed = packed.view(torch.uint8).view(self._packed_shape)
        shape, nested_block_size = self.weight_shape, self.nested_block_size
        return Weight4bit(packed, code_values, absmax, self.block_size, shape, nested, nested_block_size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.to(torch.bfloat16)` must move the codes and scales but never round them; a bias is converted as usual.
        bias = getattr(self, "bias", None)

        def keep_bytes(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if tensor is bias or moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_bytes, recurse)
        return self

    def extra_repr(self) -> str:
        """Show the layer's geometry when it is printed."""
        rows, columns = self.weight_shape
        scales = "double_quant" if self.nested_block_size else "fp32 scales"
        return f"weight=({rows}, {columns}), {self.quant_type}, block_size={self.block_size}, {scales}"


def frozen(tensor: Tensor) -> nn.Parameter:
    """Return a tensor of any shape as a parameter without gradient."""
    return nn.Parameter(tensor, requires_grad=False)
