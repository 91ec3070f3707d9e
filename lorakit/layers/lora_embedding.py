"""`LoRAEmbedding`: a frozen embedding table plus low-rank updates, computed only for the rows that are looked up."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from .adapted import AdaptedLayer
from .frozen.embedding4bit import Embedding4bit
from .gains import compose
from .row_products import forward_by_rows


class LoRAEmbedding(AdaptedLayer):
    """A frozen embedding plus a trainable low-rank update (Hu et al. 2021, arXiv:2106.09685).

        y = base(ids) + scaling * lora_A.T[ids] @ lora_B.T

    As a matrix, the table is (embedding_dim, num_embeddings), applied to one-hot vectors. At the start A is zero and B
    normal, as in the paper's code. There is no dropout, since ids cannot be dropped.

    Shapes:
        ids (...) int64 -> y (..., embedding_dim); lora_A[name] (r, num_embeddings); lora_B[name] (embedding_dim, r)
    """

    matrices = ("lora_embedding_A", "lora_embedding_B")

    def __init__(self, base_layer: nn.Embedding | Embedding4bit) -> None:
        super().__init__(base_layer, base_layer.num_embeddings, base_layer.embedding_dim)

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding | Embedding4bit)

    def base_weight(self, dtype: torch.dtype) -> Tensor:
        if isinstance(self.base_layer, Embedding4bit):
            return self.base_layer.quantized.dequantize(dtype)
        return super().base_weight(dtype)

    def base_rows(self, rows: slice) -> Tensor:
        if isinstance(self.base_layer, Embedding4bit):
            return self.as_matrix(self.base_weight(torch.float32))[rows]  # the table's rows are the matrix's columns
        return super().base_rows(rows)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def _draw(self, lora_a: Tensor, lora_b: Tensor, neutral_start: bool) -> None:
        nn.init.normal_(lora_b)
        if not neutral_start:
            nn.init.normal_(lora_a)

    def low_rank(self, lora_a: Tensor, lora_b: Tensor, x: Tensor) -> Tensor:
        return self._scaled(embedding(x, lora_a.T, self._padding) @ lora_b.T)

    def apply_matrix(self, matrix: Tensor, x: Tensor) -> Tensor:
        return self._scaled(embedding(x, matrix.T, self._padding))

    @property
    def _padding(self) -> int | None:
        return getattr(self.base_layer, "padding_idx", None)

    def _scaled(self, update: Tensor) -> Tensor:
        scale = getattr(self.base_layer, "embed_scale", None)  # Gemma scales the looked-up rows
        return update if scale is None else update * cast(Tensor, scale).to(update.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        if self.rows is not None:
            return forward_by_rows(self, ids)
        y: Tensor = self.base_layer(ids)
        result = y
        for name in self.active:
            adapter = self.adapters[name]
            update = adapter.variant.update(self, adapter, ids).to(y.dtype)
            gain = self.gain(name, adapter.lora_A.dtype)
            result = result + (update if gain is None else compose(gain, y, update))
        return result
