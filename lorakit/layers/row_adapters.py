"""Which adapter each row of a batch uses, and the tokens of the batch brought together by adapter."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ShapeError

BASE = "__base__"  # the name of no adapter: the base model alone computes such a row

# What one more block costs, as tokens that cost the same: the start of a product, and its own copy of A and B.
_BLOCK_COST = 16
_KEPT_GROUPS = 64  # batch shapes whose grouping is remembered


class RowAware:
    """What `use_rows` tells which adapter each row uses: adapted layers, and models that flatten their batches."""

    rows: RowAdapters | None = None


class Groups(NamedTuple):
    """The adapted tokens of a batch, brought together by adapter and cut into blocks of one length.

    Attributes:
        adapters: those in use.
        blocks: (blocks,) int64, the adapter of each block, as its place in `adapters`; None: one block each, in order.
        counts: blocks of each adapter; those of one adapter lie side by side.
        source: (blocks * length,) int64, the token in each place of the blocks; a place to spare repeats a token of the
            same adapter. None: the blocks, end to end, are the batch.
        tokens, places: (adapted tokens,) int64, where each token of the batch is among the blocks; places is None where
            none is to spare.
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
        """(tokens of the batch, features) -> (blocks, length, features)."""
        return (x if self.source is None else x[self.source]).view(self.number, -1, x.shape[-1])

    def of_block(self, stack: Tensor) -> Tensor:
        """(adapters, ...) -> (blocks, ...)."""
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
        names: for each row an adapter, or "__base__".
        lengths: tokens of each row, for batches that lay their rows end to end; None: the first dimension is the rows.

    Attributes:
        kept: what the products of these rows keep from one forward pass without gradient to the next, by their keys.
    """

    def __init__(self, names: Sequence[str], lengths: Sequence[int] | None = None) -> None:
        self.names = tuple(names)
        self.adapters = tuple(name for name in dict.fromkeys(names) if name != BASE)
        self.lengths = None if lengths is None else tuple(lengths)
        self._groups: dict[object, Groups | None] = {}  # by names, adapters carried, lengths and device
        self.kept: dict[object, Any] = {}

    @contextlib.contextmanager
    def laid_out(self, lengths: Sequence[int] | None) -> Iterator[None]:
        """Within the context a batch lays its rows end to end, each with so many tokens.

        Raises:
            ShapeError: there is not one length for each row.
        """
        if lengths is not None and len(lengths) != len(self.names):
            raise ShapeError(f"the batch has {len(lengths)} rows, but an adapter was named for {len(self.names)}")
        before, self.lengths = self.lengths, None if lengths is None else tuple(lengths)
        try:
            yield
        finally:
            self.lengths = before

    @contextlib.contextmanager
    def selected(self, rows: Sequence[int]) -> Iterator[None]:
        """Within the context a batch has only these of the rows, in this order."""
        before, self.names = self.names, tuple(self.names[row] for row in rows)
        try:
            yield
        finally:
            self.names = before

    def groups(self, shape: Sequence[int], carried: Collection[str], device: torch.device) -> Groups | None:
        """Return the grouping of x's leading dimensions for the adapters that a layer carries; None: no row uses one.

        Raises:
            ShapeError: the rows cannot be told apart in a batch of this shape.
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
        """Return the tokens of each row in a batch of these leading dimensions; ShapeError where it is not clear."""
        tokens = math.prod(shape)
        if self.lengths is not None:
            if sum(self.lengths) != tokens:
                raise ShapeError(f"rows of {list(self.lengths)[:8]} tokens, end to end, do not make {tuple(shape)}")
            return self.lengths
        if not shape or shape[0] != len(self.names):
            raise ShapeError(
                f"an adapter was named for each of {len(self.names)} rows, but a layer got x with leading dimensions "
                f"{tuple(shape)}; expected the rows as the first, or the lengths of rows laid end to end"
            )
        return (tokens // len(self.names),) * len(self.names)


def _grouped(
    names: Sequence[str], lengths: Sequence[int], adapters: Sequence[str], device: torch.device
) -> Groups | None:
    """Group the tokens of rows laid end to end; None where no row uses one of these adapters."""
    starts = [0, *itertools.accumulate(lengths)]
    found: dict[str, list[int]] = {}
    for name, start, length in zip(names, starts, lengths, strict=False):
        if name in adapters and length:
            found.setdefault(name, []).extend(range(start, start + length))
    if not found:
        return None
    length = _block_length([len(tokens) for tokens in found.values()])
    blocks: list[int] = []
    source: list[int] = []
    places: list[int] = []
    for place, tokens in enumerate(found.values()):
        spare = -len(tokens) % length
        places += range(len(source), len(source) + len(tokens))
        source += tokens + tokens[:1] * spare
        blocks += [place] * ((len(tokens) + spare) // length)
    tokens = list(itertools.chain.from_iterable(found.values()))
    is_whole = source == list(range(starts[-1]))
    return Groups(
        tuple(found),
        None if blocks == list(range(len(found))) else torch.tensor(blocks, device=device),
        tuple(blocks.count(place) for place in range(len(found))),
        None if is_whole else torch.tensor(source, device=device),
        torch.tensor(tokens, device=device),
        None if len(source) == len(tokens) else torch.tensor(places, device=device),
    )


def _block_length(sizes: Sequence[int]) -> int:
    """Return the block length at which adapters with so many tokens cost least, padding and blocks together."""
    return min(set(sizes), key=lambda length: sum(-(-size // length) for size in sizes) * (length + _BLOCK_COST))
