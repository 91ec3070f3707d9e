"""`TrainedTokens`: a frozen embedding with trained rows for a few tokens, such as new special tokens.

The trained rows replace those of the table. Modules that share the table's weight, such as an output head, get the same
rows (`TiedModule`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from ..errors import AdapterError
from .adapted import first_argument
from .adapter_module import WeightUpdater
from .frozen.calls import has_own_forward, present
from .row_products import forward_by_rows

_TABLE = "trainable_tokens_delta"


@dataclass(frozen=True)
class TrainedRows:
    """The record of one adapter on a `TrainedTokens`.

    Attributes:
        tokens: ids of the tokens.
        rows: (tokens, embedding_dim), the rows that replace theirs.
    """

    tokens: list[int]
    rows: nn.Parameter


class TrainedTokens(WeightUpdater):
    """An embedding with trained rows: y = rows[i] where ids equals the adapter's token i, else base(ids).

    If several active adapters train one token, the last adapter's row counts.

    Shapes:
        ids (...) int64 -> y (..., embedding_dim); trainable_tokens_delta[name] (tokens, embedding_dim). The name is
        PEFT's; the rows are whole rows, not differences.
    """

    base_layer: nn.Embedding

    def __init__(self, base_layer: nn.Embedding) -> None:
        super().__init__(base_layer)
        self.tokens: dict[str, list[int]] = {}

    def shapes(self, tokens: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the parameters that `add` will train: table name -> shape."""
        return {_TABLE: (len(tokens), self.base_layer.embedding_dim)}

    def add(self, name: str, tokens: Sequence[int], dtype: torch.dtype | None = None) -> None:
        """Attach rows for these tokens, at first equal to those of the table."""
        weight = present(self.base_layer, "weight").detach()
        rows = weight[torch.tensor(tokens, device=weight.device)]
        self.attach(name, TrainedRows(list(tokens), nn.Parameter(rows.to(dtype or rows.dtype))))

    def attach(self, name: str, record: TrainedRows) -> None:
        self.tokens[name], self.table(_TABLE)[name] = record.tokens, record.rows

    def detach(self, name: str) -> TrainedRows:
        self._deactivate(name)
        return TrainedRows(self.tokens.pop(name), self._pop_parameter(_TABLE, name))

    def names(self) -> list[str]:
        return list(self.tokens)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        return {_TABLE: cast(nn.Parameter, present(self.table(_TABLE), name))}

    def with_rows(self, weight: Tensor) -> Tensor:
        """Return a table (num_embeddings, embedding_dim) with the active adapters' rows in place."""
        for name in self.active:
            index = torch.tensor(self.tokens[name], device=weight.device)
            weight = weight.index_copy(0, index, present(self.table(_TABLE), name).to(weight.dtype))
        return weight

    @property
    def weight(self) -> Tensor:
        """The table that forward reads, (num_embeddings, embedding_dim)."""
        return self.with_rows(present(self.base_layer, "weight"))

    def updated_weight(self) -> Tensor:
        if self.rows is not None:
            raise AdapterError(f"{self.label}: the model takes its weight, the same for all rows")
        return self.weight

    def lookup(self, ids: Tensor, padding_idx: int | None = None) -> Tensor:
        return self._replaced(embedding(ids, present(self.base_layer, "weight"), padding_idx), ids)

    def current(self, key: str) -> Tensor:
        """Return a parameter of the base layer as forward uses it, for modules that share it."""
        assert key == "weight"  # an embedding has no other
        return self.weight

    def supports_rows(self, name: str) -> bool:
        return True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.rows is not None:
            return forward_by_rows(self, *args, **kwargs)
        if self.active and has_own_forward(self.base_layer):  # it may scale the rows, or shift the ids
            return self.call_with_updated_weight(args, kwargs)
        return self._replaced(self.base_layer(*args, **kwargs), first_argument(args, kwargs))

    def _replaced(self, y: Tensor, ids: Tensor) -> Tensor:
        """Return y = base(ids), (..., embedding_dim), with the active adapters' rows where their tokens stand."""
        for name in self.active:
            rows = present(self.table(_TABLE), name).to(y.dtype)
            is_token = ids[..., None] == torch.tensor(self.tokens[name], device=ids.device)  # (..., tokens)
            y = torch.where(is_token.any(-1, keepdim=True), rows[is_token.int().argmax(-1)], y)
        return y
