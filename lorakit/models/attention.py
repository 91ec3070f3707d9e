"""Attention over batches of sequences: which rows belong together, what may see what, and the keys already seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

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


class Group(NamedTuple):
    """Neighbouring sequences of like length, which attention takes as one rectangle.

    Attributes:
        start, end: their rows in the flat matrix.
        batch, length: the rectangle.
        cells: (end - start,) cell of the rectangle that each row fills, or None where the rows are the rectangle.
    """

    start: int
    end: int
    batch: int
    length: int
    cells: Tensor | None = None

    def spread(self, x: Tensor) -> Tensor:
        """(tokens, heads, dim) -> (batch, heads, length, dim), zero where there is no token."""
        x = x[self.start : self.end]
        if self.cells is not None:
            x = x.new_zeros(self.batch * self.length, *x.shape[1:]).index_copy(0, self.cells, x)
        return x.view(self.batch, self.length, *x.shape[1:]).transpose(1, 2)

    def gather(self, x: Tensor) -> Tensor:
        """(batch, heads, length, dim) -> (end - start, heads * dim), the inverse of `spread`."""
        flat = x.transpose(1, 2).reshape(self.batch * self.length, -1)
        return flat if self.cells is None else flat[self.cells]


class Layout(NamedTuple):
    """How the rows of a flat (tokens, hidden) matrix form sequences.

    Attributes:
        positions: (tokens,) position of each token in its own sequence.
        groups: the rectangles that attention works on; together they cover all rows.
        mask: additive (batch, 1, queries, keys), or None for plain causal attention.
    """

    positions: Tensor
    groups: tuple[Group, ...]
    mask: Tensor | None = None

    @staticmethod
    def rectangle(batch: int, length: int, device: torch.device) -> Layout:
        """Sequences of one length, (batch, length)."""
        return Layout(torch.arange(length, device=device).repeat(batch), (Group(0, batch * length, batch, length),))

    @staticmethod
    def packed(lengths: Sequence[int], device: torch.device) -> Layout:
        """Sequences of several lengths laid end to end, without padding; none sees another.

        Only attention pads, each group to its own longest. Padding comes last in its row, so that causality hides it.
        """
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        groups, row = [], 0
        for run in _alike(lengths):
            longest, end = max(run), row + sum(run)
            cells = None
            if min(run) < longest:
                index = torch.arange(len(run), device=device)
                cells = torch.repeat_interleave(index, torch.tensor(run, device=device)) * longest + positions[row:end]
            groups.append(Group(row, end, len(run), longest, cells))
            row = end
        return Layout(positions, tuple(groups))

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
        return Layout(positions, (Group(0, len(positions), len(padding), new),), mask[:, None])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, cache: KVCache | None) -> Tensor:
        """Attend within each sequence.

        q (tokens, heads, dim), k and v (tokens, kv_heads, dim) -> (tokens, heads * dim)
        """
        parts = []
        for group in self.groups:
            queries, keys, values = (group.spread(x) for x in (q, k, v))
            if cache is not None:
                keys, values = cache.extend(layer, keys, values)
            parts.append(group.gather(attention(queries, keys, values, self.mask)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q kᵀ / √dim + mask) v (Vaswani et al. 2017, arXiv:1706.03762, eq. 1) with grouped queries.

    Args:
        q: (batch, heads, queries, dim); k, v: (batch, kv_heads, keys, dim), each shared by heads / kv_heads queries.
        mask: additive, (batch, 1, queries, keys), for inference; None: causal.
    """
    if q.shape[1] % k.shape[1]:
        raise ShapeError(f"{q.shape[1]} query heads do not divide among {k.shape[1]} key/value heads")
    if q.device.type != "cpu" or k.shape[2] > _EXPLICIT_LENGTH:
        grouped = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)
    if mask is not None:
        return (_probabilities(q, k, mask) @ v).view(q.shape)
    result: Tensor = _CausalAttention.apply(q, k, v)
    return result


class _CausalAttention(torch.autograd.Function):
    """Saves q, k and v alone and computes the probabilities P again, which would take (heads · length) numbers a token.

    With O = P V and S the scaled scores:  dV = Pᵀ dO,  dP = dO Vᵀ,  dS = P ∘ (dP − rowsum(P ∘ dP)),  dQ = dS K / √dim,
    dK = dSᵀ Q / √dim. The queries of a group are stacked, so that the products sum dK and dV over the group.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return (_probabilities(q, k, None) @ v).view(q.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        probs = _probabilities(q, k, None)
        grad = _stack(grads[0], k.shape[1])
        dv = probs.transpose(-1, -2) @ grad
        dscores = torch._softmax_backward_data(grad @ v.transpose(-1, -2), probs, -1, q.dtype)
        scale = q.shape[-1] ** -0.5
        dq = (dscores @ k).mul_(scale).view(q.shape)
        dk = (dscores.transpose(-1, -2) @ _stack(q, k.shape[1])).mul_(scale)
        return dq, dk, dv


def _stack(x: Tensor, kv_heads: int) -> Tensor:
    """(batch, heads, queries, dim) -> (batch, kv_heads, group * queries, dim): a key head's queries, stacked."""
    return x.reshape(x.shape[0], kv_heads, -1, x.shape[-1])


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Return softmax(q kᵀ / √dim + mask), (batch, kv_heads, group * queries, keys); causal where mask is None."""
    (batch, heads, queries, dim), (kv_heads, keys) = q.shape, k.shape[1:3]
    scores: Tensor = (_stack(q, kv_heads) * dim**-0.5) @ k.transpose(-1, -2)
    if mask is None:
        mask = q.new_full((queries, keys), float("-inf")).triu_(1)[None, None]
    scores.view(batch, kv_heads, heads // kv_heads, queries, keys).add_(mask[:, :, None])
    return scores.softmax(dim=-1)


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Cut a list of lengths into runs whose longest is at most a third longer than their shortest."""
    runs: list[list[int]] = []
    for length in lengths:
        if runs and 3 * max(*runs[-1], length) <= 4 * min(*runs[-1], length):
            runs[-1].append(length)
        else:
            runs.append([length])
    return runs


def project_heads(x: Tensor, layer: nn.Module, head_dim: int) -> Tensor:
    """Apply a q, k or v projection to x (tokens, hidden): (tokens, heads, head_dim)."""
    y: Tensor = layer(x)
    return y.view(len(x), -1, head_dim)
