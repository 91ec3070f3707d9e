"""Keys and values of the tokens seen so far, for generation."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """The keys and values of a batch of sequences, left-padded, after a prefix that all of them may share.

        [shared prefix][padding][rest of the prompt][generated ...]

    The prefix (a system prompt, worked examples) is computed and kept once, whatever the batch.

    Args:
        layers, heads, head_dim: of the decoder; `heads` counts the key/value heads.
        padding: (batch,) int64, padding positions of each sequence.
        capacity: positions to reserve after the prefix.
        prefix: the cache of one sequence without padding, already filled.

    Attributes:
        keys, values: (layers, batch, heads, capacity, head_dim).
        length: positions filled, including padding but not the prefix.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        head_dim: int,
        padding: Tensor,
        capacity: int,
        dtype: torch.dtype,
        *,
        prefix: KVCache | None = None,
    ) -> None:
        shape = (layers, len(padding), heads, capacity, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=padding.device)
        self.values = torch.empty(shape, dtype=dtype, device=padding.device)
        self.padding, self.prefix, self.length = padding, prefix, 0

    @property
    def prefix_length(self) -> int:
        """Positions of the shared prefix."""
        return 0 if self.prefix is None else self.prefix.length

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (batch, heads, new, head_dim) for one layer; return all of that layer's keys and values."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def shared(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Return the prefix's keys and values of one layer, each (heads, prefix, head_dim), if there is one."""
        if self.prefix is None:
            return None
        end = self.prefix.length
        return self.prefix.keys[layer, 0, :, :end], self.prefix.values[layer, 0, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of the batch, (kept,) int64."""
        self.keys, self.values, self.padding = self.keys[:, rows], self.values[:, rows], self.padding[rows]
