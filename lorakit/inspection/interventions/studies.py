"""Finding the parts of an adapter that matter: apply interventions one after another and measure a metric at each.

    metric = held_out_loss(tok, records)
    causal_map(model, metric, by="kind").table()       # the loss without q_proj's updates, without k_proj's, ...

That a layer with a large update matters is a guess; this is the experiment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from ...adapters import disable_adapters
from ...data import Record, encode_records
from ...errors import AdapterError, did_you_mean
from ...models.tokenizer.tokenizer import Tokenizer
from ...training import mean_loss
from ..measure.module_paths import module_paths
from ..tables import Tidy
from .interventions import ablated, active_layers, scaled, swapped, truncated, without_directions

Metric = Callable[[nn.Module], float]
By = Literal["module", "kind", "block"]


def held_out_loss(
    tok: Tokenizer, records: Sequence[Record], max_length: int = 1024, micro_batch_tokens: int = 2048
) -> Metric:
    """Return a metric: nats per trained token of these conversations.

    Raises:
        DataError: a record cannot be encoded, or there is none.
    """
    examples = encode_records(tok, records, max_length)
    return lambda model: mean_loss(model, examples, micro_batch_tokens)


@dataclass(frozen=True)
class Effect:
    """The effect of one intervention.

    Attributes:
        what: the layer, kind, block or direction.
        layers: the paths that were changed.
        value: the metric's.
        change: value - the metric of the whole adapter.
        share: change / (metric without the adapter, or with the other one - metric of the whole adapter): 1 is all that
            the adapter does; None where the adapter does nothing.
    """

    what: str
    layers: tuple[str, ...]
    value: float
    change: float
    share: float | None


@dataclass(frozen=True)
class CausalMap(Tidy):
    """The effects of one intervention on every part in turn.

    Attributes:
        whole: the metric with the adapter as it is.
        other: the metric without the adapter; for a swap, with the other adapter.
        effects: in model order.
    """

    whole: float
    other: float
    effects: tuple[Effect, ...]

    def ranked(self) -> list[Effect]:
        """Return the effects, with the greatest change first."""
        return sorted(self.effects, key=lambda effect: -abs(effect.change))

    def table(self) -> list[dict[str, Any]]:
        """Return one row per effect."""
        return [asdict(effect) | {"layers": len(effect.layers)} for effect in self.effects]


@dataclass(frozen=True)
class Curve(Tidy):
    """A metric against a setting.

    Attributes:
        setting: its name: "factor" or "rank".
        points: (setting, metric).
    """

    setting: str
    points: tuple[tuple[float, float], ...]

    def table(self) -> list[dict[str, Any]]:
        """Return one row per point."""
        return [{self.setting: x, "value": value} for x, value in self.points]


def causal_map(
    model: nn.Module, metric: Metric, by: By = "module", adapter: str | None = None, keep: bool = False
) -> CausalMap:
    """Ablate every part in turn, to see which ones the metric needs.

    Args:
        by: a part is a module ("module"), all modules of a kind such as q_proj ("kind"), or a block ("block").
        keep: ablate everything but the part instead, to see which parts are enough.

    Raises:
        AdapterError: there is no such adapter, or several are active and none is named.
    """
    name, layers = active_layers(model, adapter)
    groups = _grouped(layers, by)
    whole = _measured(model, metric)
    with disable_adapters(model):
        other = _measured(model, metric)
    effects = []
    for what, paths in groups.items():
        with ablated(model, [path for path in layers if path not in paths] if keep else paths, name):
            effects.append(_effect(what, paths, _measured(model, metric), whole, other))
    return CausalMap(whole, other, tuple(effects))


def direction_map(
    model: nn.Module, metric: Metric, layers: Iterable[str], adapter: str | None = None, top: int = 4
) -> CausalMap:
    """Remove the leading singular directions of these layers' updates, one at a time.

    Args:
        top: directions per layer.

    Raises:
        AdapterError: as `ablated`.
    """
    name, chosen = active_layers(model, adapter, layers)
    whole = _measured(model, metric)
    with disable_adapters(model):
        other = _measured(model, metric)
    effects = []
    for path, layer in chosen.items():
        for direction in range(min(top, len(layer.lora_A[name]))):
            with without_directions(model, path, [direction], name):
                effects.append(_effect(f"{path}[{direction}]", (path,), _measured(model, metric), whole, other))
    return CausalMap(whole, other, tuple(effects))


def swap_map(model: nn.Module, metric: Metric, first: str, second: str, by: By = "module") -> CausalMap:
    """Replace each part of the active adapter `first` by the update of adapter `second` there, one part at a time.

    Raises:
        AdapterError: there is no such adapter, or `first` is not active.
    """
    _, layers = active_layers(model, first)
    whole = _measured(model, metric)
    with swapped(model, layers, first, second):
        other = _measured(model, metric)
    effects = []
    for what, paths in _grouped(layers, by).items():
        with swapped(model, paths, first, second):
            effects.append(_effect(what, paths, _measured(model, metric), whole, other))
    return CausalMap(whole, other, tuple(effects))


def scale_sweep(
    model: nn.Module, metric: Metric, factors: Sequence[float] = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2),
    layers: Iterable[str] | None = None, adapter: str | None = None,
) -> Curve:  # fmt: skip
    """Measure with lora_alpha multiplied by several factors.

    Raises:
        AdapterError: as `ablated`.
    """
    paths = list(active_layers(model, adapter, layers)[1])
    points = []
    for factor in factors:
        with scaled(model, factor, paths, adapter):
            points.append((float(factor), _measured(model, metric)))
    return Curve("factor", tuple(points))


def rank_curve(
    model: nn.Module, metric: Metric, ranks: Sequence[int] | None = None, adapter: str | None = None
) -> Curve:
    """Measure with every update cut to several ranks; by default 0 and the powers of two up to the largest rank.

    Raises:
        AdapterError: as `truncated`.
    """
    name, layers = active_layers(model, adapter)
    if ranks is None:
        largest = max(len(layer.lora_A[name]) for layer in layers.values())
        ranks = [0, *(2**power for power in range(largest.bit_length()) if 2**power < largest), largest]
    points = []
    for rank in ranks:
        with truncated(model, rank, adapter=name):
            points.append((float(rank), _measured(model, metric)))
    return Curve("rank", tuple(points))


def _grouped(layers: Iterable[str], by: By) -> dict[str, tuple[str, ...]]:
    """Group paths: each on its own, by the kind of module, or by block."""
    if by not in ("module", "kind", "block"):
        raise AdapterError(
            f"expected parts by module, kind or block, got '{by}'{did_you_mean(by, ('module', 'kind', 'block'))}"
        )
    groups: dict[str, list[str]] = {}
    for path, place in module_paths(layers).items():
        block = path if place.index is None else f"{place.stack}.{place.index}"
        groups.setdefault({"module": path, "kind": place.module, "block": block}[by], []).append(path)
    return {what: tuple(paths) for what, paths in groups.items()}


def _effect(what: str, paths: Sequence[str], value: float, whole: float, other: float) -> Effect:
    change = value - whole
    return Effect(what, tuple(paths), value, change, change / (other - whole) if other != whole else None)


@torch.no_grad()
def _measured(model: nn.Module, metric: Metric) -> float:
    return float(metric(model))
