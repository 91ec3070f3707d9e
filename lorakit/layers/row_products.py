"""Per-row adapters: one batch whose rows each use an adapter of their own, or none.

The whole batch shares one frozen product, which is nearly all of the work. The updates are two batched products. The
tokens of each adapter are grouped and cut into blocks, and each block is multiplied by its adapter's A and B from a
stack (as in Punica's grouped product, Chen et al. 2023, arXiv:2310.18547). All of it is differentiable, and an
adapter's gradient comes from its own rows alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lorakit_kernels import is_transformed
from torch import Tensor
from torch.nn.functional import pad

from ..errors import AdapterError
from .adapted import AdaptedLayer, first_argument
from .adapter_module import AdapterModule
from .dropout import dropout
from .frozen.values import call_layer
from .gains import compose
from .row_adapters import BASE, Groups, RowAdapters


class _Stacks(NamedTuple):
    """The stacked adapters of layers that read one x, padded with zeros to the largest rank, in the products' dtype.

    Attributes:
        down: (adapters, sum of the layers' ranks, in_features).
        ups: for each layer (adapters, out_features, rank), scaled.
        gains: for each layer (adapters, out_features), fp32 or better, or None for 1.
    """

    down: Tensor
    ups: list[Tensor]
    gains: list[Tensor | None]


class _Source(NamedTuple):
    """A parameter that stacks were made from: its place, where `functional_call` may put another, and its version."""

    place: dict[str, Any]
    name: str
    parameter: Tensor
    version: int


class _Kept(NamedTuple):
    """Stacks, and the scalings and parameters they were made from."""

    stacks: _Stacks
    scalings: list[float]
    sources: list[_Source]


def forward_by_rows(module: AdapterModule, *args: Any, **kwargs: Any) -> Tensor:
    """Run a module's forward once for each adapter, on that adapter's rows, and put the results together.

    This serves modules without a batched product of several adapters: embeddings, convolutions, copies, biases.

    Args:
        args, kwargs: of forward. Its input x is the first.

    Shapes:
        x (rows, ...); with lengths (tokens, ...), or with more leading dimensions that together hold the tokens

    Raises:
        ShapeError: x's shape does not fit the rows.
        AdapterError: the module takes or returns tensors that cannot be divided into rows.
    """
    rows, active = module.rows, module.active
    assert rows is not None
    x, rest = first_argument(args, kwargs), [*args, *kwargs.values()][1:]
    if not isinstance(x, Tensor) or any(isinstance(other, Tensor) for other in rest):
        raise AdapterError(f"{module.label}: only a single tensor can be divided into rows with adapters of their own")
    given = args[1:], dict(list(kwargs.items())[0 if args else 1 :])
    leading = 1
    if rows.lengths is not None:
        sizes = list(itertools.accumulate(x.shape, int.__mul__))
        leading = sizes.index(sum(rows.lengths)) + 1 if sum(rows.lengths) in sizes else x.dim()
    lengths = rows.lengths_in(x.shape[:leading])
    names = [name if name in module.names() else BASE for name in rows.names]
    members: dict[str, list[int]] = {}
    start = 0
    for name, length in zip(names, lengths, strict=True):
        members.setdefault(name, []).extend(range(start, start + length))
        start += length
    flat = x.flatten(0, leading - 1)
    results, module.rows = [], None
    try:
        for name, indices in members.items():
            module.active = () if name == BASE else (name,)
            result = module.forward(flat[torch.tensor(indices, device=x.device)], *given[0], **given[1])
            if not isinstance(result, Tensor) or len(result) != len(indices):
                raise AdapterError(f"{module.label}: its output has no rows, so they cannot have adapters of their own")
            results.append(result)
    finally:
        module.rows, module.active = rows, active
    order = torch.tensor(list(itertools.chain.from_iterable(members.values())), device=x.device).argsort()
    y: Tensor = torch.cat(results)[order].unflatten(0, x.shape[:leading])
    return y


def linear_with_rows(x: Tensor, *layers: AdaptedLayer) -> tuple[Tensor, ...]:
    """Apply linear layers that have `rows` to one x: for each row the base layer and the update of its own adapter.

    Shapes:
        x (..., in_features) -> for each layer (..., out_features)

    Raises:
        ShapeError: x's shape does not fit the rows.
    """
    rows = layers[0].rows
    assert rows is not None
    results = [call_layer(layer.base_layer, x) for layer in layers]
    if other := next((one for one, y in zip(layers, results, strict=True) if not one.is_product(y, x)), None):
        raise AdapterError(f"{other.label}: its output has no rows, so they cannot have adapters of their own")
    all_groups = [rows.groups(x.shape[:-1], layer.adapters, x.device) for layer in layers]
    drops = any(layer.drop_rate(name) for layer in layers for name in layer.adapters)
    if drops or any(groups is not all_groups[0] for groups in all_groups):  # each layer by itself
        products = [(groups, [index]) for index, groups in enumerate(all_groups)]
    else:
        products = [(all_groups[0], list(range(len(layers))))]
    for groups, indices in products:
        if groups is not None:
            updated = _with_updates(x, rows, groups, [layers[i] for i in indices], [results[i] for i in indices])
            for index, result in zip(indices, updated, strict=True):
                results[index] = result
    return tuple(results)


def _with_updates(
    x: Tensor, rows: RowAdapters, groups: Groups, layers: Sequence[AdaptedLayer], results: Sequence[Tensor]
) -> Iterator[Tensor]:
    """Yield each layer's result with gain * (result + update) in the adapters' rows; the bias is not scaled."""
    stacks = _stacks(rows, layers, groups.adapters, x.dtype)
    gathered = groups.gather(x.reshape(-1, x.shape[-1]))  # (blocks, length, in_features)
    dropped = _dropped(gathered, layers[0], groups)
    us = dropped @ groups.of_block(stacks.down).transpose(1, 2)  # (blocks, length, ranks)
    widths = [up.shape[2] for up in stacks.ups]
    for layer, y, u, up, gain in zip(layers, results, us.split(widths, 2), stacks.ups, stacks.gains, strict=True):
        flat, up_t = y.reshape(-1, y.shape[-1]), groups.of_block(up).transpose(1, 2)
        if gain is None and groups.source is None and y.dtype == u.dtype:  # product and sum in one
            yield torch.baddbmm(flat.view(groups.number, -1, y.shape[-1]), u, up_t).view(y.shape)
            continue
        update = u @ up_t  # (blocks, length, out_features)
        if gain is not None:
            product = groups.gather(flat) if dropped is gathered else layer.base_layer(dropped)
            bias = layer.base_layer.bias
            product = product - bias.to(product.dtype) if isinstance(bias, Tensor) else product
            update = compose(groups.of_block(gain)[:, None], product, update.to(product.dtype))
        yield groups.add(flat, update).view(y.shape)


def _dropped(x: Tensor, layer: AdaptedLayer, groups: Groups) -> Tensor:
    """Drop elements of x (blocks, length, in_features), each with its adapter's probability."""
    rates = [layer.drop_rate(name) for name in groups.adapters]
    if not any(rates):
        return x
    parts = zip(x.split(groups.counts), rates, strict=True)
    return torch.cat([dropout(part, rate) if rate else part for part, rate in parts])


def _stacks(
    rows: RowAdapters, layers: Sequence[AdaptedLayer], adapters: tuple[str, ...], dtype: torch.dtype
) -> _Stacks:
    """Return the stacked adapters of layers. Without gradient they are kept until a parameter or scaling changes."""
    if torch.is_grad_enabled() or is_transformed():
        return _stacked(layers, adapters, dtype)
    key = tuple(layers), adapters, dtype
    kept: _Kept | None = rows.kept.get(key)
    scalings = [layer.adapters[name].scaling for layer in layers for name in adapters]
    if kept is None or kept.scalings != scalings or not _are_unchanged(kept.sources):
        held = [
            (layer.table(table)._parameters, name, parameter)
            for layer in layers
            for name in adapters
            for table, parameter in layer.adapters[name].parameters.items()
        ]
        stacks = _stacked(layers, adapters, dtype)
        if any(parameter.is_inference() for _, _, parameter in held):  # inference tensors have no version counter
            return stacks
        kept = rows.kept[key] = _Kept(stacks, scalings, [_Source(*source, source[2]._version) for source in held])
    return kept.stacks


def _are_unchanged(sources: Sequence[_Source]) -> bool:
    return all(
        place.get(name) is parameter and parameter._version == version for place, name, parameter, version in sources
    )


def _stacked(layers: Sequence[AdaptedLayer], adapters: tuple[str, ...], dtype: torch.dtype) -> _Stacks:
    downs, ups, gains = zip(*(_stacked_layer(layer, adapters, dtype) for layer in layers), strict=True)
    return _Stacks(downs[0] if len(downs) == 1 else torch.cat(downs, dim=1), list(ups), list(gains))


def _stacked_layer(
    layer: AdaptedLayer, adapters: tuple[str, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    factors = [layer.factors(name) for name in adapters]
    widest = max(len(down) for _, down in factors)
    # Cast one by one: a stack in fp32 would take one more pass over memory and twice the memory.
    down = torch.stack([_padded(down.to(dtype), 0, 0, 0, widest - len(down)) for _, down in factors])
    up = torch.stack([_padded(up.to(dtype), 0, widest - up.shape[1]) for up, _ in factors])
    gains = [layer.gain(name, dtype) for name in adapters]
    present = [gain for gain in gains if gain is not None]
    if not present:
        return down, up, None
    ones = torch.ones_like(present[0])
    return down, up, torch.stack([ones if gain is None else gain for gain in gains])


def _padded(matrix: Tensor, *amounts: int) -> Tensor:
    return pad(matrix, amounts) if any(amounts) else matrix
