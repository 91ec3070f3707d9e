"""Contexts that ablate, scale, truncate or swap parts of an adapter for as long as they last.

A context leaves the model as it was, bit for bit, even when something raises in it: it puts another object in a
parameter's place and brings the old object back. `studies` applies the contexts in turn and measures their effect.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ...adapters import lora_layers
from ...adapters.attach.state import apply_state, check_adapter, home_of, homes, state_of
from ...adapters.low_rank import LowRank
from ...errors import AdapterError, did_you_mean
from ...layers import AdaptedLayer, AdapterModule


@contextlib.contextmanager
def ablated(model: nn.Module, layers: Iterable[str], adapter: str | None = None) -> Iterator[nn.Module]:
    """Within the context, the adapter does nothing on these layers.

    Raises:
        AdapterError: there is no such adapter, or a layer does not carry it.
    """
    name, chosen = active_layers(model, adapter, layers)
    with _overriding(model, {layer: {name: None} for layer in chosen.values()}):
        yield model


@contextlib.contextmanager
def swapped(model: nn.Module, layers: Iterable[str], first: str, second: str) -> Iterator[nn.Module]:
    """Within the context, these layers have the update of adapter `second` instead of that of `first`.

    A layer that does not carry `second` has neither.

    Raises:
        AdapterError: there is no such adapter, or `first` is not active, or a layer does not carry it.
    """
    check_adapter(model, second)
    if second in state_of(home_of(model, second)).on_host:
        raise AdapterError(f"adapter '{second}' is kept in host memory; make it active once to bring it to the device")
    _, chosen = active_layers(model, first, layers)
    with _overriding(model, {layer: {first: second} for layer in chosen.values()}):
        yield model


@contextlib.contextmanager
def scaled(
    model: nn.Module, factor: float, layers: Iterable[str] | None = None, adapter: str | None = None
) -> Iterator[nn.Module]:
    """Within the context, lora_alpha is multiplied by `factor`, on these layers or on all.

    Raises:
        AdapterError: as `ablated`.
    """
    name, chosen = active_layers(model, adapter, layers)
    before = {layer: layer.scaling[name] for layer in chosen.values()}
    try:
        for layer, scaling in before.items():
            layer.scaling[name] = factor * scaling
        yield model
    finally:
        for layer, scaling in before.items():
            layer.scaling[name] = scaling


@contextlib.contextmanager
def truncated(
    model: nn.Module, rank: int, layers: Iterable[str] | None = None, adapter: str | None = None
) -> Iterator[nn.Module]:
    """Within the context, the nearest matrix of at most this rank replaces B A, on these layers or on all.

    Raises:
        AdapterError: as `ablated`, or the rank is negative.
    """
    if rank < 0:
        raise AdapterError(f"expected a rank of 0 or more, got {rank}")
    name, chosen = active_layers(model, adapter, layers)
    to_cut = [layer for layer in chosen.values() if rank < len(layer.lora_A[name])]
    with _replacing(name, {layer: _product(layer, name).truncated(rank) for layer in to_cut}):
        yield model


@contextlib.contextmanager
def without_directions(
    model: nn.Module, layer: str, directions: Iterable[int], adapter: str | None = None
) -> Iterator[nn.Module]:
    """Within the context, these singular directions of a layer's B A are removed; 0 is that of the largest value.

    Raises:
        AdapterError: as `ablated`, or there is no such direction.
    """
    name, chosen = active_layers(model, adapter, [layer])
    u, s, vh = _product(chosen[layer], name).svd
    removed = sorted(set(directions))
    if removed and not 0 <= removed[0] <= removed[-1] < len(s):
        raise AdapterError(f"{layer} has directions 0 to {len(s) - 1}, got {removed}")
    kept = s.clone()
    kept[removed] = 0.0
    with _replacing(name, {chosen[layer]: LowRank(u * kept, vh)}):
        yield model


# ---- the parts that they share ---------------------------------------------------------------------------------------


def active_layers(
    model: nn.Module, adapter: str | None, paths: Iterable[str] | None = None
) -> tuple[str, dict[str, AdaptedLayer]]:
    """Return the adapter's name and its layers, all or those at `paths`, in model order.

    Raises:
        AdapterError: there is no such adapter, it is not active, or a path does not carry it.
    """
    active = [name for home in homes(model) for name in state_of(home).active]
    if adapter is None:
        if len(active) != 1:
            names = ", ".join(active) or "none"
            raise AdapterError(f"{len(active)} adapters are active ({names}); name one, or make exactly one active")
        adapter = active[0]
    check_adapter(model, adapter)
    if adapter not in active:
        raise AdapterError(
            f"adapter '{adapter}' is not active, so that changing it would have no effect; call set_adapter first"
        )
    layers = lora_layers(model, adapter)
    if paths is None:
        return adapter, layers
    wanted = set(paths)
    for path in wanted - layers.keys():
        raise AdapterError(f"no layer '{path}' carries adapter '{adapter}'{did_you_mean(path, layers)}")
    return adapter, {path: layer for path, layer in layers.items() if path in wanted}


@contextlib.contextmanager
def _overriding(model: nn.Module, change: Mapping[AdapterModule, Mapping[str, str | None]]) -> Iterator[None]:
    """Within the context, layers use other adapters instead of active ones, whatever is switched meanwhile."""
    found = homes(model)
    for home in found:
        state_of(home).overrides.append(change)
        apply_state(home)
    try:
        yield
    finally:
        for home in found:
            open_changes = state_of(home).overrides
            open_changes[:] = [one for one in open_changes if one is not change]
            apply_state(home)


@contextlib.contextmanager
def _replacing(name: str, products: Mapping[AdaptedLayer, LowRank]) -> Iterator[None]:
    """Within the context, other parameters replace A and B; after it, the very same objects are back."""
    before = {layer: (layer.lora_A[name], layer.lora_B[name]) for layer in products}
    try:
        for layer, product in products.items():
            layer.lora_A[name], layer.lora_B[name] = _as_parameters(layer, name, product)
        yield
    finally:
        for layer, (lora_a, lora_b) in before.items():
            layer.lora_A[name], layer.lora_B[name] = lora_a, lora_b


def _product(layer: AdaptedLayer, name: str) -> LowRank:
    """Return B A in float64, without the scaling.

    Raises:
        AdapterError: the layer has one for each expert.
    """
    if layer.factors(name)[0].ndim != 2:
        raise AdapterError(
            f"the updates of experts cannot be cut in rank: {type(layer).__name__}({layer.extra_repr()})"
        )
    lora_a, lora_b = layer.lora_A[name].detach(), layer.lora_B[name].detach()
    return LowRank(lora_b.flatten(1).double(), lora_a.flatten(1).double())


def _as_parameters(layer: AdaptedLayer, name: str, product: LowRank) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A and B of a product, in the layer's shapes and dtype, fp32 or better; of rank 1 at least."""
    lora_a, lora_b = layer.lora_A[name], layer.lora_B[name]
    up, down = product.up, product.down
    if product.rank == 0:
        up, down = up.new_zeros(len(up), 1), down.new_zeros(1, down.shape[1])  # kernels need at least one column

    def parameter(matrix: Tensor, like: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
        dtype = torch.promote_types(like.dtype, torch.float32)
        return nn.Parameter(matrix.to(dtype).reshape(shape).contiguous(), requires_grad=False)

    rank = len(down)
    return (
        parameter(down, lora_a, (rank, *lora_a.shape[1:])),
        parameter(up, lora_b, (len(lora_b), rank, *lora_b.shape[2:])),
    )
