"""`Embedding4bit`: a frozen embedding table in 4 bits that decodes only the rows that are looked up."""

from __future__ import annotations

import torch
from lorakit_kernels import is_transformed
from torch import Tensor, nn

from ...errors import ShapeError
from ...quantization import QuantizedWeight, quantize
from .quantized_module import QuantizedModule


class Embedding4bit(QuantizedModule):
    """A frozen embedding with a 4-bit table: y = dequantize(W)[ids], bit for bit.

    Shapes:
        ids (...) int64 -> y (..., embedding_dim) in `dtype`; packed (num_embeddings, embedding_dim / 2) uint8.

    Args:
        weight: the quantized table, (num_embeddings, embedding_dim).
        dtype: dtype of the result; None: the dtype of the original table.
        storage_dtype: dtype of the packed bytes, as for `Linear4bit`.

    Raises:
        ShapeError: the weight is not two-dimensional, or an id is outside the table.
    """

    def __init__(
        self, weight: QuantizedWeight, dtype: torch.dtype | None = None, storage_dtype: torch.dtype = torch.uint8
    ) -> None:
        super().__init__(weight, storage_dtype)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.dtype = dtype or weight.dtype

    @staticmethod
    def from_embedding(
        dense: nn.Embedding, quant_type: str = "nf4", block_size: int = 64, double_quant: bool = True
    ) -> Embedding4bit:
        """Quantize a dense table, which stays unchanged.

        Raises:
            ShapeError, ConfigError: as `lorakit.quantize`.
        """
        return Embedding4bit(quantize(dense.weight, quant_type, block_size, double_quant))

    def forward(self, ids: Tensor) -> Tensor:
        if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling() and not is_transformed():
            low, high = ids.aminmax()
            if low < 0 or high >= self.num_embeddings:
                bad = int(low if low < 0 else high)
                raise ShapeError(f"id {bad} is outside the table of {self.num_embeddings} embeddings")
        return self.quantized.gather(ids, self.dtype)
