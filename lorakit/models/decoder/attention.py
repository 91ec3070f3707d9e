"""Attention over batches of sequences: which rows form a sequence, and which tokens each may see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lorakit_kernels import is_transformed
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...errors import ShapeError
from .cache import KVCache

# On the CPU, explicit products beat PyTorch's fused kernel: forward and backward of 9 heads in bf16 take 17 against 32
# ms at 2 x 512 tokens, 32 against 47 at 1 x 1,024, 1.9 against 2.4 s at 1 x 8,192. Blocks of 128 are the best of
# 64 to 1,024. The fused kernel is faster only for one token after another over 16 x 700 keys, with a mask.
QUERY_BLOCK = 128
_MASKED_SCORES = 512 * 512  # scores of a head; above it, masked attention uses the fused kernel


class Group(NamedTuple):
    """Neighboring sequences of similar length, which attention processes as one rectangle.

    Attributes:
        start, end: their rows in the flat matrix.
        batch, length: the rectangle.
        cells: (end - start,) cell of the rectangle that each row fills, or None if the rows fill the whole rectangle.
    """

    start: int
    end: int
    batch: int
    length: int
    cells: Tensor | None = None

    def spread(self, x: Tensor) -> Tensor:
        """Return x (tokens, heads, dim) as (batch, heads, length, dim), zero where there is no token."""
        x = x[self.start : self.end]
        if self.cells is not None:
            x = x.new_zeros(self.batch * self.length, *x.shape[1:]).index_copy(0, self.cells, x)
        return x.view(self.batch, self.length, *x.shape[1:]).transpose(1, 2)

    def gather(self, x: Tensor) -> Tensor:
        """Return x (batch, heads, length, dim) as (end - start, heads * dim): the inverse of `spread`."""
        flat = x.transpose(1, 2).reshape(self.batch * self.length, -1)
        return flat if self.cells is None else flat[self.cells]


class Layout(NamedTuple):
    """How the rows of a flat (tokens, hidden) matrix form sequences.

    Attributes:
        positions: (tokens,) position of each token in its own sequence.
        groups: the rectangles that attention works on; together they cover all rows.
        mask: additive (batch, 1, queries, keys), or None for plain causal attention.
        shared: number of leading rows with which every sequence begins.
    """

    positions: Tensor
    groups: tuple[Group, ...]
    mask: Tensor | None = None
    shared: int = 0

    @staticmethod
    def rectangle(batch: int, length: int, device: torch.device) -> Layout:
        """Return the layout of sequences of one length, (batch, length)."""
        return Layout(torch.arange(length, device=device).repeat(batch), (Group(0, batch * length, batch, length),))

    @staticmethod
    def packed(lengths: Sequence[int], device: torch.device, shared: int = 0) -> Layout:
        """Return the layout of sequences of several lengths laid end to end, without padding.

        No sequence sees another; all see the shared rows. Only attention pads, each group to its longest sequence.
        Padding comes last in its sequence, where causality hides it.
        """
        rests = [shared + torch.arange(length, device=device) for length in lengths]
        positions = torch.cat([torch.arange(shared, device=device), *rests])
        groups, row = [Group(0, shared, 1, shared)] if shared else [], shared
        for run in _runs_of_similar_length(lengths):
            longest, end = max(run), row + sum(run)
            cells = None
            if min(run) < longest:
                first = torch.arange(len(run), device=device) * longest - shared  # cell of position 0
                cells = torch.repeat_interleave(first, torch.tensor(run, device=device)) + positions[row:end]
            groups.append(Group(row, end, len(run), longest, cells))
            row = end
        return Layout(positions, tuple(groups), shared=shared)

    @staticmethod
    def cached(cache: KVCache, new: int, dtype: torch.dtype) -> Layout:
        """Return the layout of `new` more tokens of each sequence in the cache, whose padding is masked."""
        device, padding = cache.padding.device, cache.padding[:, None]
        query = torch.arange(cache.length, cache.length + new, device=device)
        key = torch.arange(cache.length + new, device=device)
        seen = (key >= padding)[:, None] & (key <= query[:, None])  # (batch, queries, keys)
        seen |= key == query[:, None]  # a padding position sees itself: otherwise its softmax would be 0 / 0
        mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))
        positions = cache.prefix_length + (query - padding).clamp(min=0).view(-1)
        return Layout(positions, (Group(0, len(positions), len(padding), new),), mask[:, None])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, cache: KVCache | None) -> Tensor:
        """Attend within each sequence.

        q (tokens, heads, dim), k and v (tokens, kv_heads, dim) -> (tokens, heads * dim)
        """
        results = []
        for group in self.groups:
            queries, keys, values = (group.spread(x) for x in (q, k, v))
            if group.start >= self.shared > 0:
                keys, values = self._with_shared(k, keys), self._with_shared(v, values)
            shared = None
            if cache is not None:
                keys, values = cache.extend(layer, keys, values)
                shared = cache.shared(layer)
            if shared is None or self.mask is None:
                mixed = attention(queries, keys, values, self.mask)
            else:
                mixed = _attention_with_prefix(queries, keys, values, self.mask, *shared)
            results.append(group.gather(mixed))
        return results[0] if len(results) == 1 else torch.cat(results)

    def _with_shared(self, x: Tensor, rest: Tensor) -> Tensor:
        """Put the shared rows of x (tokens, heads, dim) before each sequence's rest (batch, heads, length, dim)."""
        shared = x[: self.shared].transpose(0, 1).expand(len(rest), -1, -1, -1)
        return torch.cat([shared, rest], dim=2)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q kᵀ / √dim + mask) v (Vaswani et al. 2017, arXiv:1706.03762, eq. 1) with grouped queries.

    Args:
        q: (batch, heads, queries, dim); k, v: (batch, kv_heads, keys, dim), each shared by heads / kv_heads queries.
        mask: additive, (batch, 1, queries, keys), for inference; None: causal, and the last query sees all keys.

    Returns:
        (batch, heads, queries, dim).

    Raises:
        ShapeError: heads is not a multiple of kv_heads.
    """
    if q.shape[1] % k.shape[1]:
        raise ShapeError(f"{q.shape[1]} query heads do not divide among {k.shape[1]} key/value heads")
    if is_transformed():
        return (_scores(q, k, mask).softmax(dim=-1) @ v).reshape(q.shape)
    if mask is None and q.device.type == "cpu":
        result: Tensor = _CausalAttention.apply(q, k, v)
        return result
    if q.device.type != "cpu" or q.shape[2] * k.shape[2] > _MASKED_SCORES:
        grouped, is_causal = q.shape[1] != k.shape[1], mask is None and q.shape[2] == k.shape[2]
        if mask is None and not is_causal:  # is_causal would line up the first query with the first key
            mask = _causal_mask(q, k.shape[2])
        return scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=grouped)
    return (_scores(q, k, mask).softmax(dim=-1) @ v).view(q.shape)


class _CausalAttention(torch.autograd.Function):
    """Saves only q, k and v, and recomputes the probabilities P, which would take (heads · length) numbers a token.

    With O = P V and S the scaled scores:  dV = Pᵀ dO,  dP = dO Vᵀ,  dS = P ∘ (dP − rowsum(P ∘ dP)),  dQ = dS K / √dim,
    dK = dSᵀ Q / √dim. The queries of a group are stacked, so that the products sum dK and dV over the group.

    Queries are taken in blocks. A block skips the keys that its last query cannot see, which halves the work of a long
    sequence, and only one block's scores are in memory. dK and dV are summed over the blocks in fp32.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        result = torch.empty_like(q)
        for first, last, seen in query_blocks(q.shape[2], k.shape[2]):
            queries = q[:, :, first:last]
            probs = _scores(queries, k[:, :, :seen], None).softmax(dim=-1)
            result[:, :, first:last] = (probs @ v[:, :, :seen]).view(queries.shape)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        # Made from the gradient: with `is_grads_batched`, it is a batch of gradients, and so are they.
        dq = torch.empty_like(grads[0])
        dk, dv = (grads[0].new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v))
        for first, last, seen in query_blocks(q.shape[2], k.shape[2]):
            queries, keys, values = q[:, :, first:last], k[:, :, :seen], v[:, :, :seen]
            probs = _scores(queries, keys, None).softmax(dim=-1)
            # `narrow` as the vmap of `is_grads_batched` cannot slice a whole dimension.
            grad = _stack(grads[0].narrow(2, first, last - first), k.shape[1])
            dv.narrow(2, 0, seen).add_(probs.transpose(-1, -2) @ grad)
            dscores = torch._softmax_backward_data(grad @ values.transpose(-1, -2), probs, -1, q.dtype)
            dq.narrow(2, first, last - first).copy_((dscores @ keys).mul_(scale).view(queries.shape))
            dk.narrow(2, 0, seen).add_(dscores.transpose(-1, -2) @ _stack(queries, k.shape[1]))
        return dq, dk.mul_(scale).to(k.dtype), dv.to(v.dtype)


def query_blocks(queries: int, keys: int) -> Iterator[tuple[int, int, int]]:
    """Yield each block's first query, the query after its last, and how many keys its last query sees."""
    for first in range(0, queries, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, queries)
        yield first, last, keys - queries + last


def _stack(x: Tensor, kv_heads: int) -> Tensor:
    """Return x (batch, heads, queries, dim) as (batch, kv_heads, group * queries, dim): each key head's queries."""
    return x.reshape(x.shape[0], kv_heads, -1, x.shape[-1])


def _scores(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Return q kᵀ / √dim + mask, (batch, kv_heads, group * queries, keys); causal where mask is None."""
    (batch, heads, queries, dim), (kv_heads, keys) = q.shape, k.shape[1:3]
    scores: Tensor = (_stack(q, kv_heads) * dim**-0.5) @ k.transpose(-1, -2)
    if mask is None:
        mask = _causal_mask(q, keys)
    scores.view(batch, kv_heads, heads // kv_heads, queries, keys).add_(mask[:, :, None])
    return scores


def _causal_mask(q: Tensor, keys: int) -> Tensor:
    """Return an additive mask, (1, 1, queries, keys): the last query sees all keys, each one before it one key less."""
    queries = q.shape[2]
    return q.new_full((queries, keys), float("-inf")).triu_(1 + keys - queries)[None, None]


def _attention_with_prefix(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    """Attend to a prefix that the whole batch shares, (kv_heads, prefix, dim), and to each sequence's own keys.

    One product per head covers the queries of all sequences, instead of one per sequence and copy of the prefix.
    """
    batch, kv_heads, prefix = len(q), len(prefix_k), prefix_k.shape[1]
    stacked = _stack(q, kv_heads) * q.shape[-1] ** -0.5  # (batch, kv_heads, group * queries, dim)
    together = stacked.transpose(0, 1).reshape(kv_heads, -1, q.shape[-1])  # (kv_heads, batch * group * queries, dim)
    shared = (together @ prefix_k.transpose(-1, -2)).view(kv_heads, batch, -1, prefix).transpose(0, 1)
    probs = torch.cat([shared, _scores(q, k, mask)], dim=-1).softmax(dim=-1)
    from_prefix = probs[..., :prefix].transpose(0, 1).reshape(kv_heads, -1, prefix) @ prefix_v
    mixed = from_prefix.view(kv_heads, batch, -1, q.shape[-1]).transpose(0, 1) + probs[..., prefix:] @ v
    return mixed.reshape(q.shape)


def _runs_of_similar_length(lengths: Sequence[int]) -> list[list[int]]:
    """Cut a list of lengths into runs whose longest is at most a third longer than the shortest."""
    runs: list[list[int]] = []
    for length in lengths:
        if runs and 3 * max(*runs[-1], length) <= 4 * min(*runs[-1], length):
            runs[-1].append(length)
        else:
            runs.append([length])
    return runs
