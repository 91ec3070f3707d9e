"""Per-row adapters: one batch whose rows each use an adapter of their own, or none.

The frozen product, nearly all of the work, is one for the whole batch. The updates are two batched products: the tokens
of one adapter are brought together and cut into blocks, and each block meets its adapter's A and B in a stack (as in
Punica's grouped product, Chen et al. 2023, arXiv:2310.18547). All of it is differentiable: an adapter's gradient comes
from its own rows alone.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..errors import ShapeError

if TYPE_CHECKING:
    from .adapted import AdaptedLayer, AdapterPart

BASE = "__base__"  # the name of no adapter: the base model alone computes such a row

# What one more block costs, as tokens that cost the same: the start of a product, and its own copy of A and B.
_BLOCK_COST = 16
_KEPT_GROUPS = 64  # batch shapes whose grouping is remembered


class TakesRows:
    """What `use_rows` tells which adapter each row uses: adapted layers, and models that flatten their batches."""

    rows: Rows | None = None


class Groups(NamedTuple):
    """The adapted tokens of a batch, brought together by adapter and cut into blocks of one length.

    Attributes:
        adapters: those in use.
        blocks: (blocks,) int64, the adapter of each block, as its place in `adapters`; None: one block each, in order.
        number: of blocks.
        source: (blocks * length,) int64, the token in each place of the blocks; a place to spare repeats a token of the
            same adapter. None: the blocks, end to end, are the batch.
        tokens, places: (adapted tokens,) int64, where each token of the batch is among the blocks; places is None where
            none is to spare.
    """

    adapters: tuple[str, ...]
    blocks: Tensor | None
    number: int
    source: Tensor | None
    tokens: Tensor
    places: Tensor | None

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


class _Stacks(NamedTuple):
    """The adapters of layers that read one x, stacked: padded with zeros to the largest rank, in the products' dtype.

    Attributes:
        down: (adapters, sum of the layers' ranks, in_features).
        ups: for each layer (adapters, out_features, rank), scaled.
        gains: for each layer (adapters, out_features), or None for 1.
    """

    down: Tensor
    ups: list[Tensor]
    gains: list[Tensor | None]


class _Kept(NamedTuple):
    """Stacks, the parameters they were made from, and how often each had been written to."""

    stacks: _Stacks
    parameters: list[nn.Parameter]
    versions: list[int]


class Rows:
    """Which adapter each row of a batch uses; the adapted layers of a model share one such object.

    Args:
        names: for each row an adapter, or "__base__".
        lengths: tokens of each row, for batches that lay their rows end to end; None: the first dimension is the rows.
    """

    def __init__(self, names: Sequence[str], lengths: Sequence[int] | None = None) -> None:
        self.names = tuple(names)
        self.adapters = tuple(name for name in dict.fromkeys(names) if name != BASE)
        self.lengths = None if lengths is None else tuple(lengths)
        self._groups: dict[object, Groups | None] = {}  # by names, adapters carried, lengths and device
        self._kept: dict[object, _Kept] = {}  # by layers, adapters and dtype

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

    def groups(self, shape: Sequence[int], layer: AdaptedLayer, device: torch.device) -> Groups | None:
        """Return the grouping of x's leading dimensions for the adapters that a layer carries; None: there is none.

        Raises:
            ShapeError: the rows cannot be told apart in a batch of this shape.
        """
        carried = tuple(name for name in self.adapters if name in layer.scaling)
        lengths = self.lengths_in(shape)
        key = self.names, carried, lengths, device
        if key not in self._groups:
            if len(self._groups) >= _KEPT_GROUPS:
                self._groups.clear()
            self._groups[key] = _grouped(self.names, lengths, carried, device)
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

    def stacks(self, layers: Sequence[AdaptedLayer], adapters: tuple[str, ...], dtype: torch.dtype) -> _Stacks:
        """Return the adapters of layers, stacked; without gradient they are kept until a parameter changes."""
        if torch.is_grad_enabled():
            return _stacked(layers, adapters, dtype)
        key = tuple(layers), adapters, dtype
        kept = self._kept.get(key)
        if kept is None or kept.versions != [parameter._version for parameter in kept.parameters]:
            parameters = [p for layer in layers for name in adapters for p in layer.parameters_of(name).values()]
            stacks = _stacked(layers, adapters, dtype)
            if any(parameter.is_inference() for parameter in parameters):  # no one counts what is written to these
                return stacks
            kept = self._kept[key] = _Kept(stacks, parameters, [parameter._version for parameter in parameters])
        return kept.stacks


def forward_by_rows(part: AdapterPart, x: Tensor) -> Tensor:
    """Run a module's forward once for each adapter, on that adapter's rows, and put the results together.

    For modules of which several adapters have no batched product: embeddings, convolutions, copies, biases. Without
    lengths the rows are x's first dimension; with lengths the tokens are its leading dimensions, of whatever number.

    Raises:
        ShapeError: the rows cannot be told apart in a batch of x's shape.
    """
    rows, active = part.rows, part.active
    assert rows is not None
    leading = 1
    if rows.lengths is not None:
        sizes = list(itertools.accumulate(x.shape, int.__mul__))
        leading = sizes.index(sum(rows.lengths)) + 1 if sum(rows.lengths) in sizes else x.dim()
    lengths = rows.lengths_in(x.shape[:leading])
    names = [name if name in part.names() else BASE for name in rows.names]
    members: dict[str, list[int]] = {}
    start = 0
    for name, length in zip(names, lengths, strict=True):
        members.setdefault(name, []).extend(range(start, start + length))
        start += length
    flat = x.flatten(0, leading - 1)
    results, part.rows = [], None
    try:
        for name, places in members.items():
            part.active = () if name == BASE else (name,)
            results.append(part.forward(flat[torch.tensor(places, device=x.device)]))
    finally:
        part.rows, part.active = rows, active
    order = torch.tensor(list(itertools.chain.from_iterable(members.values())), device=x.device).argsort()
    y: Tensor = torch.cat(results)[order].unflatten(0, x.shape[:leading])
    return y


def linear_with_rows(x: Tensor, *layers: AdaptedLayer) -> tuple[Tensor, ...]:
    """Apply linear layers that have `rows` to one x: for each row the base layer and the update of its own adapter.

    Shapes:
        x (..., in_features) -> for each layer (..., out_features)

    Raises:
        ShapeError: the rows cannot be told apart in a batch of x's shape.
    """
    rows = layers[0].rows
    assert rows is not None
    results = [layer.base_layer(x) for layer in layers]
    found = [rows.groups(x.shape[:-1], layer, x.device) for layer in layers]
    drops = any(layer.training and any(layer.dropout_p.values()) for layer in layers)
    if drops or any(groups is not found[0] for groups in found):  # layer by layer, each with its own
        parts = [(groups, [place]) for place, groups in enumerate(found)]
    else:
        parts = [(found[0], list(range(len(layers))))]
    for groups, places in parts:
        if groups is not None:
            added = _with_updates(x, rows, groups, [layers[i] for i in places], [results[i] for i in places])
            for place, result in zip(places, added, strict=True):
                results[place] = result
    return tuple(results)


def _with_updates(
    x: Tensor, rows: Rows, groups: Groups, layers: Sequence[AdaptedLayer], results: Sequence[Tensor]
) -> Iterator[Tensor]:
    """Return each layer's result with gain * (result + update), bias left out, in the rows of the adapters."""
    stacks = rows.stacks(layers, groups.adapters, x.dtype)
    given = groups.gather(x.reshape(-1, x.shape[-1]))  # (blocks, length, in_features)
    dropped = _dropped(given, layers[0], groups)
    us = dropped @ groups.of_block(stacks.down).transpose(1, 2)  # (blocks, length, ranks)
    widths = [up.shape[2] for up in stacks.ups]
    for layer, y, u, up, gain in zip(layers, results, us.split(widths, 2), stacks.ups, stacks.gains, strict=True):
        flat, across = y.reshape(-1, y.shape[-1]), groups.of_block(up).transpose(1, 2)
        if gain is None and groups.source is None and y.dtype == u.dtype:  # product and sum in one
            yield torch.baddbmm(flat.view(groups.number, -1, y.shape[-1]), u, across).view(y.shape)
            continue
        update = u @ across  # (blocks, length, out_features)
        if gain is not None:
            product = groups.gather(flat) if dropped is given else layer.base_layer(dropped)
            bias = layer.base_layer.bias
            product = product - bias.to(product.dtype) if isinstance(bias, Tensor) else product
            gain = groups.of_block(gain)[:, None]
            update = (gain - 1) * product + gain * update
        yield groups.add(flat, update).view(y.shape)


def _dropped(x: Tensor, layer: AdaptedLayer, groups: Groups) -> Tensor:
    """Drop numbers of x (blocks, length, in_features), each with the probability that its adapter has."""
    rates = [layer.dropout_p[name] for name in groups.adapters]
    if not (layer.training and any(rates)):
        return x
    rate = groups.of_block(torch.tensor(rates, device=x.device))[:, None, None]
    kept = torch.rand(x.shape, device=x.device) >= rate
    return x * (kept / (1 - rate)).to(x.dtype)


def _stacked(layers: Sequence[AdaptedLayer], adapters: tuple[str, ...], dtype: torch.dtype) -> _Stacks:
    downs, ups, gains = zip(*(_stacked_layer(layer, adapters, dtype) for layer in layers), strict=True)
    return _Stacks(downs[0] if len(downs) == 1 else torch.cat(downs, dim=1), list(ups), list(gains))


def _stacked_layer(
    layer: AdaptedLayer, adapters: tuple[str, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    factors = [layer.factors(name) for name in adapters]
    widest = max(len(down) for _, down in factors)
    # Cast one by one: a stack in fp32 would be one more pass over memory, and twice the memory.
    down = torch.stack([_padded(down.to(dtype), 0, 0, 0, widest - len(down)) for _, down in factors])
    up = torch.stack([_padded(up.to(dtype), 0, widest - up.shape[1]) for up, _ in factors])
    gains = [layer.variants[name].gain(layer, name, dtype) for name in adapters]
    if all(gain is None for gain in gains):
        return down, up, None
    ones = torch.ones(layer.out_features, device=down.device)
    return down, up, torch.stack([ones if gain is None else gain for gain in gains]).to(dtype)


def _padded(matrix: Tensor, *amounts: int) -> Tensor:
    return pad(matrix, amounts) if any(amounts) else matrix


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
        len(blocks),
        None if is_whole else torch.tensor(source, device=device),
        torch.tensor(tokens, device=device),
        None if len(source) == len(tokens) else torch.tensor(places, device=device),
    )


def _block_length(sizes: Sequence[int]) -> int:
    """Return the block length at which adapters with so many tokens cost least, padding and blocks together."""
    return min(set(sizes), key=lambda length: sum(-(-size // length) for size in sizes) * (length + _BLOCK_COST))
