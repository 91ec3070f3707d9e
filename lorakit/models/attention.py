"""Attention over batches of sequences: which rows belong together, what may see what, and the keys already seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, softmax

from ..errors import ShapeError

# On CPU, explicit matmuls beat the fused kernel (whose backward is slow) up to about this length: 7 against 27 ms at
# 16 x 96, 18 against 31 ms at 2 x 512, 49 against 44 ms at 1 x 1,024 (forward + backward, 9 heads, bf16).
_EXPLICIT_LENGTH = 512


class KVCache:
    """Keys and values of the tokens seen so far, for generation.

    Prompts of different lengths are padded between a prefix that all of them share and what follows it:

        [shared prefix][padding][rest of the prompt][generated ...]

    so that the prefix is computed once for the whole batch. Without a shared prefix this is plain left padding.

    Args:
        layers, heads, head_dim: of the decoder; `heads` counts the key/value heads.
        padding: (batch,) int64, padding positions of each sequence.
        prefix: length of the shared prefix.
        capacity: positions to reserve.
    """

    def __init__(
        self, layers: int, heads: int, head_dim: int, padding: Tensor, prefix: int, capacity: int, dtype: torch.dtype
    ) -> None:
        shape = (layers, len(padding), heads, capacity, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=padding.device)
        self.values = torch.empty(shape, dtype=dtype, device=padding.device)
        self.padding, self.prefix, self.length = padding, prefix, 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (batch, heads, new, head_dim) for one layer; return all of that layer's keys and values."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def copy_prefix(self, single: KVCache) -> None:
        """Take over the shared prefix from a cache of one sequence."""
        self.length = single.length
        self.keys[:, :, :, : self.length] = single.keys[:, :, :, : self.length]
        self.values[:, :, :, : self.length] = single.values[:, :, :, : self.length]

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of the batch, (kept,) int64."""
        self.keys, self.values, self.padding = self.keys[:, rows], self.values[:, rows], self.padding[rows]


class Layout(NamedTuple):
    """How the rows of a flat (tokens, hidden) matrix form sequences.

    Attributes:
        batch, length: the rectangle that attention works on.
        positions: (tokens,) position of each token in its own sequence.
        cells: (tokens,) cell of the rectangle that each token fills, or None where the tokens are the rectangle.
        mask: additive (..., queries, keys), or None for plain causal attention.
    """

    batch: int
    length: int
    positions: Tensor
    cells: Tensor | None
    mask: Tensor | None

    @staticmethod
    def rectangle(batch: int, length: int, device: torch.device) -> Layout:
        """Sequences of one length, (batch, length)."""
        return Layout(batch, length, torch.arange(length, device=device).repeat(batch), None, None)

    @staticmethod
    def packed(lengths: Sequence[int], device: torch.device) -> Layout:
        """Sequences of several lengths laid end to end, without padding; none sees another.

        Only attention spreads them over a rectangle. Padding comes last in its row, so that causality hides it.
        """
        longest = max(lengths)
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        rows = torch.repeat_interleave(torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device))
        cells = None if min(lengths) == longest else rows * longest + positions
        return Layout(len(lengths), longest, positions, cells, None)

    @staticmethod
    def cached(cache: KVCache, new: int, dtype: torch.dtype) -> Layout:
        """`new` more tokens of each sequence in the cache; its padding is masked."""
        device, padding = cache.padding.device, cache.padding[:, None]
        query = torch.arange(cache.length, cache.length + new, device=device)
        key = torch.arange(cache.length + new, device=device)
        real = (key < cache.prefix) | (key >= cache.prefix + padding)  # (batch, keys)
        seen = real[:, None] & (key <= query[:, None])  # (batch, queries, keys)
        seen |= key == query[:, None]  # a padding position sees itself, lest its softmax be 0 / 0
        mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))
        positions = torch.where(query < cache.prefix, query, (query - padding).clamp(min=0)).view(-1)
        return Layout(len(padding), new, positions, None, mask[:, None])

    def spread(self, x: Tensor) -> Tensor:
        """(tokens, heads, dim) -> (batch, heads, length, dim), zero where there is no token."""
        if self.cells is not None:
            x = x.new_zeros(self.batch * self.length, *x.shape[1:]).index_copy(0, self.cells, x)
        return x.view(self.batch, self.length, *x.shape[1:]).transpose(1, 2)

    def gather(self, x: Tensor) -> Tensor:
        """(batch, heads, length, dim) -> (tokens, heads * dim), the inverse of `spread`."""
        flat = x.transpose(1, 2).reshape(self.batch * self.length, -1)
        return flat if self.cells is None else flat[self.cells]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return softmax(q kᵀ / √dim + mask) v (Vaswani et al. 2017, arXiv:1706.03762, eq. 1) with grouped queries.

    Args:
        q: (batch, heads, queries, dim); k, v: (batch, kv_heads, keys, dim), each shared by heads / kv_heads queries.
        mask: additive, broadcast to (batch, 1, queries, keys); None: causal.
    """
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    if heads % kv_heads:
        raise ShapeError(f"{heads} query heads do not divide among {kv_heads} key/value heads")
    if q.device.type != "cpu" or keys > _EXPLICIT_LENGTH:
        return scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=heads != kv_heads)
    if mask is None:
        mask = q.new_full((queries, keys), float("-inf")).triu_(1)
    group = heads // kv_heads  # the group's queries are stacked, so that keys and values are never repeated
    stacked = (q * dim**-0.5).reshape(batch, kv_heads, group * queries, dim)
    scores = (stacked @ k.transpose(-1, -2)).view(batch, kv_heads, group, queries, keys)
    probs = softmax(scores + (mask[:, :, None] if mask.dim() == 4 else mask), dim=-1)
    return (probs.view(batch, kv_heads, group * queries, keys) @ v).view(batch, heads, queries, dim)


def project_heads(x: Tensor, layer: nn.Module, head_dim: int) -> Tensor:
    """Apply a q, k or v projection to x (tokens, hidden): (tokens, heads, head_dim)."""
    y: Tensor = layer(x)
    return y.view(len(x), -1, head_dim)
