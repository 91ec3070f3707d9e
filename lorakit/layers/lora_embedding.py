"""`LoRAEmbedding`: a frozen embedding table plus low-rank updates, computed only for the rows that are looked up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from .adapted import AdaptedLayer
from .frozen.embedding4bit import Embedding4bit
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

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def _draw(self, lora_a: Tensor, lora_b: Tensor, neutral_start: bool) -> None:
        nn.init.normal_(lora_b)
        if not neutral_start:
            nn.init.normal_(lora_a)

    def low_rank(self, lora_a: Tensor, lora_b: Tensor, x: Tensor) -> Tensor:
        return embedding(x, lora_a.T, self._padding) @ lora_b.T

    def apply_matrix(self, matrix: Tensor, x: Tensor) -> Tensor:
        return embedding(x, matrix.T, self._padding)

    @property
    def _padding(self) -> int | None:
        return getattr(self.base_layer, "padding_idx", None)

    def drop_rate(self, name: str) -> float:
        """Return 0, since ids cannot be dropped."""
        return 0.0

    def made_up_input(self, generator: torch.Generator) -> Tensor:
        return torch.randint(self.in_features, (16,), generator=generator)

    def lookup(self, ids: Tensor, padding_idx: int | None = None) -> Tensor:
        return self.with_updates(embedding(ids, self.frozen_weight(), padding_idx), ids)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs) if self.rows is None else forward_by_rows(self, *args, **kwargs)
