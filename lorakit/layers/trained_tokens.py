"""`TrainedTokens`: a frozen embedding of which an adapter trains the rows of a few tokens, as new special tokens need.

The rows replace those of the table. An output head that shares the table's weight gets the same rows (`TiedHead`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .adapted import AdapterModule
from .row_products import forward_by_rows
from .saved_module import SavedModule

_TABLE = "trainable_tokens_delta"


@dataclass(frozen=True)
class TrainedRows:
    """What a `TrainedTokens` holds of one adapter.

    Attributes:
        tokens: ids of the tokens.
        rows: (tokens, embedding_dim), what stands in the place of their rows.
    """

    tokens: list[int]
    rows: nn.Parameter


@dataclass(frozen=True)
class FollowedEmbedding:
    """What a `TiedHead` holds of one adapter: nothing of its own; it follows what the embedding has."""


class TrainedTokens(AdapterModule):
    """An embedding with trained rows: y = rows[i] where ids equals the adapter's token i, else base(ids).

    Of several active adapters that train one token, the last one's row counts.

    Shapes:
        ids (...) int64 -> y (..., embedding_dim); trainable_tokens_delta[name] (tokens, embedding_dim), PEFT's name
        for what are whole rows, not differences.
    """

    base_layer: nn.Embedding

    def __init__(self, base_layer: nn.Embedding) -> None:
        super().__init__(base_layer)
        self.tokens: dict[str, list[int]] = {}

    def shapes(self, tokens: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Return what `add` will train: name of the table -> shape."""
        return {_TABLE: (len(tokens), self.base_layer.embedding_dim)}

    def add(self, name: str, tokens: Sequence[int], dtype: torch.dtype | None = None) -> None:
        """Attach rows for these tokens, equal to those of the table for now."""
        rows = self.base_layer.weight.detach()[torch.tensor(tokens, device=self.base_layer.weight.device)]
        self.attach(name, TrainedRows(list(tokens), nn.Parameter(rows.to(dtype or rows.dtype))))

    def attach(self, name: str, record: TrainedRows) -> None:
        self.tokens[name], self.table(_TABLE)[name] = record.tokens, record.rows

    def detach(self, name: str) -> TrainedRows:
        self._deactivate(name)
        return TrainedRows(self.tokens.pop(name), self._take(_TABLE, name))

    def names(self) -> list[str]:
        return list(self.tokens)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        return {_TABLE: cast(nn.Parameter, self.table(_TABLE)[name])}

    def with_rows(self, weight: Tensor) -> Tensor:
        """Return a table (tokens, dim) with the active adapters' rows in their places."""
        for name in self.active:
            index = torch.tensor(self.tokens[name], device=weight.device)
            weight = weight.index_copy(0, index, self.table(_TABLE)[name].to(weight.dtype))
        return weight

    @property
    def weight(self) -> Tensor:
        """The table that forward looks up in."""
        return self.with_rows(self.base_layer.weight)

    def supports_rows(self, name: str) -> bool:
        return True

    def forward(self, ids: Tensor) -> Tensor:
        if self.rows is not None:
            return forward_by_rows(self, ids)
        y: Tensor = self.base_layer(ids)
        for name in self.active:
            rows = self.table(_TABLE)[name].to(y.dtype)
            scale = getattr(self.base_layer, "embed_scale", None)
            rows = rows if scale is None else rows * cast(Tensor, scale).to(rows.dtype)
            same = ids[..., None] == torch.tensor(self.tokens[name], device=ids.device)  # (..., tokens)
            y = torch.where(same.any(-1, keepdim=True), rows[same.int().argmax(-1)], y)
        return y


class TiedHead(AdapterModule):
    """An output head whose weight is that of an embedding, also while an adapter trains the embedding or rows of it."""

    base_layer: nn.Linear

    def __init__(self, base_layer: nn.Linear, embedding: TrainedTokens | SavedModule) -> None:
        super().__init__(base_layer)
        self._embedding = (embedding,)  # in a tuple: it is no child of this module
        self._names: list[str] = []

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Nothing is trained here."""
        return {}

    def add(self, name: str) -> None:
        """Follow what this adapter makes of the embedding."""
        self.attach(name, FollowedEmbedding())

    def attach(self, name: str, record: FollowedEmbedding) -> None:
        self._names.append(name)

    def detach(self, name: str) -> FollowedEmbedding:
        self._deactivate(name)
        self._names.remove(name)
        return FollowedEmbedding()

    def names(self) -> list[str]:
        return list(self._names)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        return {}

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            y: Tensor = self.base_layer(x)
            return y
        return linear(x, self._embedding[0].weight.to(x.dtype), self.base_layer.bias)
