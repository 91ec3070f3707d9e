"""Which adapter each row of a batch uses, and the batch's tokens grouped by adapter."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ShapeError

BASE = "__base__"  # names no adapter: the base model alone computes such a row

# The cost of one more block, in tokens that cost the same: starting a product, and a copy of A and B.
_BLOCK_COST = 16
_KEPT_GROUPS = 64  # number of batch shapes whose grouping is cached


class RowAware:
    """Base class of modules that need to know each row's adapter: adapted layers, and models that flatten batches.

    Attributes:
        rows: the adapter of each row, set by `use_rows`.
    """

    rows: RowAdapters | None = None


class Groups(NamedTuple):
    """The adapted tokens of a batch, grouped by adapter and cut into blocks of one length.

    Attributes:
        adapters: names of the adapters in use.
        blocks: (blocks,) int64, the adapter of each block as an index into `adapters`; None: one block each, in order.
        counts: number of blocks of each adapter; the blocks of one adapter are adjacent.
        source: (blocks * length,) int64, the token at each position of the blocks; padding repeats a token of the same
            adapter. None: the blocks, end to end, are the batch.
        tokens, places: (adapted tokens,) int64, the indices of the adapted tokens in the batch and their positions in
            the blocks; places is None if there is no padding.
    """

    adapters: tuple[str, ...]
    blocks: Tensor | None
    counts: tuple[int, ...]
    source: Tensor | None
    tokens: Tensor
    places: Tensor | None

    @property
    def number(self) -> int:
        """Number of blocks."""
        return sum(self.counts)

    def gather(self, x: Tensor) -> Tensor:
        """Return x, (tokens of the batch, features), as blocks (blocks, length, features)."""
        return (x if self.source is None else x[self.source]).view(self.number, -1, x.shape[-1])

    def of_block(self, stack: Tensor) -> Tensor:
        """Return each block's entry of a stack: (adapters, ...) -> (blocks, ...)."""
        return stack if self.blocks is None else stack[self.blocks]

    def add(self, y: Tensor, update: Tensor) -> Tensor:
        """Return y (tokens of the batch, features) plus update (blocks, length, features)."""
        update = update.flatten(0, 1).to(y.dtype)
        if self.source is None:
            return y + update
        return y.index_add(0, self.tokens, update if self.places is None else update[self.places])


class RowAdapters:
    """Which adapter each row of a batch uses; the adapted layers of a model share one such object.

    Args:
        names: the adapter of each row, or "__base__".
        lengths: tokens of each row, for batches with rows end to end; None: the first dimension is the rows.

    Attributes:
        kept: a cache for the products of these rows, kept between forward passes without gradient.
    """

    def __init__(self, names: Sequence[str], lengths: Sequence[int] | None = None) -> None:
        self.names = tuple(names)
        self.adapters = tuple(name for name in dict.fromkeys(names) if name != BASE)
        self.lengths = None if lengths is None else tuple(lengths)
        self._groups: dict[object, Groups | None] = {}  # by names, adapters carried, lengths and device
        self.kept: dict[object, Any] = {}

    @contextlib.contextmanager
    def laid_out(self, lengths: Sequence[int] | None) -> Iterator[None]:
        """Within the context, a batch has its rows end to end, with these lengths in tokens.

        Raises:
            ShapeError: the number of lengths is not the number of rows.
        """
        if lengths is not None and len(lengths) != len(self.names):
            raise ShapeError(f"the batch has {len(lengths)} rows, but adapters were named for {len(self.names)}")
        before, self.lengths = self.lengths, None if lengths is None else tuple(lengths)
        try:
            yield
        finally:
            self.lengths = before

    @contextlib.contextmanager
    def selected(self, rows: Sequence[int]) -> Iterator[None]:
        """Within the context, a batch has only these rows, in this order."""
        before, self.names = self.names, tuple(self.names[row] for row in rows)
        try:
            yield
        finally:
            self.names = before

    def groups(self, shape: Sequence[int], carried: Collection[str], device: torch.device) -> Groups | None:
        """Return the groups of a batch's tokens, or None if no row uses an adapter of the layer.

        Args:
            shape: leading dimensions of x.
            carried: names of the adapters on the layer.
            device: the device of the groups' tensors.

        Raises:
            ShapeError: a batch of this shape does not fit the rows.
        """
        adapters = tuple(name for name in self.adapters if name in carried)
        lengths = self.lengths_in(shape)
        key = self.names, adapters, lengths, device
        if key not in self._groups:
            if len(self._groups) >= _KEPT_GROUPS:
                self._groups.clear()
            self._groups[key] = _grouped(self.names, lengths, adapters, device)
        return self._groups[key]

    def lengths_in(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the number of tokens of each row in a batch with these leading dimensions.

        Raises:
            ShapeError: the leading dimensions do not fit the rows.
        """
        tokens = math.prod(shape)
        if self.lengths is not None:
            if sum(self.lengths) != tokens:
                raise ShapeError(f"rows of {list(self.lengths)[:8]} tokens, end to end, do not fill {tuple(shape)}")
            return self.lengths
        if not shape or shape[0] != len(self.names):
            raise ShapeError(
                f"adapters were named for {len(self.names)} rows, but a layer got x with leading dimensions "
                f"{tuple(shape)}; expected the rows as the first dimension, or the lengths of rows laid end to end"
            )
        return (tokens // len(self.names),) * len(self.names)


def _grouped(
    names: Sequence[str], lengths: Sequence[int], adapters: Sequence[str], device: torch.device
) -> Groups | None:
    """Group the tokens of rows laid end to end; None if no row uses one of these adapters."""
    starts = [0, *itertools.accumulate(lengths)]
    members: dict[str, list[int]] = {}  # adapter -> its tokens
    for name, start, length in zip(names, starts, lengths, strict=False):
        if name in adapters and length:
            members.setdefault(name, []).extend(range(start, start + length))
    if not members:
        return None
    length = _block_length([len(tokens) for tokens in members.values()])
    blocks: list[int] = []
    source: list[int] = []
    places: list[int] = []
    for index, tokens in enumerate(members.values()):
        padding = -len(tokens) % length
        places += range(len(source), len(source) + len(tokens))
        source += tokens + tokens[:1] * padding
        blocks += [index] * ((len(tokens) + padding) // length)
    tokens = list(itertools.chain.from_iterable(members.values()))
    is_batch = source == list(range(starts[-1]))
    return Groups(
        tuple(members),
        None if blocks == list(range(len(members))) else torch.tensor(blocks, device=device),
        tuple(blocks.count(index) for index in range(len(members))),
        None if is_batch else torch.tensor(source, device=device),
        torch.tensor(tokens, device=device),
        None if len(source) == len(tokens) else torch.tensor(places, device=device),
    )


def _block_length(sizes: Sequence[int]) -> int:
    """Return the block length that minimizes the cost of padding and blocks for adapters with these token counts."""
    return min(set(sizes), key=lambda length: sum(-(-size // length) for size in sizes) * (length + _BLOCK_COST))
