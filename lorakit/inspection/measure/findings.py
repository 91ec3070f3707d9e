"""What stands out in an inspected adapter, in sentences with numbers, the most important first.

A finding states a measurement, not its meaning for a task: only an evaluation of the task shows that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePath
from statistics import fmean, median

from ..compare.similarity import SHARED_COSINE
from . import intruders
from .info import AdapterInfo
from .layer_info import LayerInfo

KEPT = 0.99  # least share of the update that the recommended rank keeps
_CONCENTRATED = 2.0  # layers are named when their share of the update is this many times that of the parameters
_WEAK = 0.01  # of the median norm of a layer's own kind of module: below it a layer is as good as dead


def findings(info: AdapterInfo) -> Iterator[str]:
    """Yield the findings, the most important first.

    Beside another adapter, the comparison comes first, and each adapter's own findings begin with its name.
    """
    if info.other is None:
        yield from _own(info)
        return
    here, there = _names(info.source, info.other.source)
    yield from _compared(info, here, there)
    ours, theirs = list(_own(info)), list(info.other.findings)
    if ours == theirs:
        yield from (f"both: {finding}" for finding in ours)
        return
    yield from (f"{here}: {finding}" for finding in ours)
    yield from (f"{there}: {finding}" for finding in theirs)


def _own(info: AdapterInfo) -> Iterator[str]:
    """Yield what stands out in an adapter by itself and against its base."""
    if info.changed_base:
        yield f"the start '{info.changed_base}' moved part of the base into the adapter: B A is not the whole change"
    yield from _dead_layers(info)
    if info.norm == 0:
        return
    yield from _ranks(info)
    yield from _concentration(info)
    yield from _noise(info)
    yield from _dead_units(info)
    yield from _against_base(info)
    if info.extras:
        yield f"{len(info.extras)} tensors beside the low-rank updates are not measured: {_listed(info.extras)}"


def _dead_layers(info: AdapterInfo) -> Iterator[str]:
    dead = [layer.name for layer in info.layers if layer.dead]
    if len(dead) == len(info.layers):
        yield f"every update is exactly zero: the adapter of {len(dead)} layers changes nothing"
        return
    if dead:
        yield (
            f"{len(dead)} of {len(info.layers)} layers are dead (their update is exactly zero; exclude_modules can "
            f"leave them out): {_listed(dead)}"
        )
    weak = []
    for group in _by_module(info).values():
        typical = median(layer.norm for layer in group)
        weak += [layer for layer in group if not layer.dead and layer.norm < _WEAK * typical]
    if weak:
        words = _listed([f"{layer.name} ({layer.norm:.2g})" for layer in weak])
        yield f"{len(weak)} layers changed by less than {_WEAK:.0%} of the median for their kind: {words}"


def _ranks(info: AdapterInfo) -> Iterator[str]:
    alive = [layer for layer in info.layers if not layer.dead]
    ranks = sorted({layer.rank for layer in info.layers})
    used = fmean(layer.effective_rank for layer in alive)
    allotted = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    enough = next((r for r in range(1, ranks[-1]) if info.energy(r) >= KEPT), ranks[-1])
    if enough < ranks[-1]:
        kept = _percent(info.energy(enough))
        advice = f"r={enough} would keep {kept} of the update; `lorakit resize --rank {enough}` cuts it to that"
    else:
        kept = _percent(info.energy(enough - 1))
        advice = f"r={max(1, enough - 1)} would keep {kept} of the update, less than {KEPT:.0%}, so keep the rank"
    yield f"{allotted} allotted, {used:.1f} used (mean effective rank): {advice}"
    short = [layer for layer in alive if layer.numerical_rank < min(layer.rank, *layer.shape)]
    if short:
        words = _listed([f"{layer.name} ({layer.numerical_rank} of {layer.rank})" for layer in short])
        yield f"the update of {len(short)} layers has a lower rank than was allotted: {words}"


def _concentration(info: AdapterInfo) -> Iterator[str]:
    """Name the kind of module, the stretch of layers, or both together, that holds far more than its share."""
    concentrated = [
        (share - part, f"{words} hold {share:.0%} of the update with {part:.0%} of its parameters")
        for words, share, part in _stretches(info)
        if share >= 0.25 and share >= _CONCENTRATED * part
    ]
    if concentrated:
        yield max(concentrated)[1]  # by difference: of equal ratios, the larger place says more


def _stretches(info: AdapterInfo) -> Iterator[tuple[str, float, float]]:
    """Yield names with their shares of the update and of the parameters.

    There is one for every kind of module, and for every run of at most a third of the blocks, over all modules and over
    each kind.
    """
    total = sum(layer.parameters for layer in info.layers)
    kinds = _by_module(info)
    for module, group in kinds.items() if len(kinds) > 1 else ():
        yield f"the {module} layers", sum(map(info.share, group)), sum(layer.parameters for layer in group) / total
    for stack in {layer.stack for layer in info.layers if layer.index is not None}:
        inside = [layer for layer in info.layers if layer.stack == stack and layer.index is not None]
        numbers = sorted({layer.index for layer in inside if layer.index is not None})
        if len(numbers) < 2:
            continue
        for kind in [None, *kinds] if len(kinds) > 1 else [None]:
            chosen = [layer for layer in inside if kind in (None, layer.module)]
            shares, parts = dict.fromkeys(numbers, 0.0), dict.fromkeys(numbers, 0.0)
            for layer in chosen:
                shares[layer.index or 0] += info.share(layer)
                parts[layer.index or 0] += layer.parameters / total
            for first in range(len(numbers)):
                for last in range(first, min(len(numbers), first + max(1, len(numbers) // 3))):
                    run = numbers[first : last + 1]
                    words = f"layers {run[0]}-{run[-1]}" if last > first else f"layer {run[0]}"
                    share, part = sum(shares[number] for number in run), sum(parts[number] for number in run)
                    yield f"{words} {kind or '(all modules)'}", share, part


def _noise(info: AdapterInfo) -> Iterator[str]:
    alive = [layer for layer in info.layers if not layer.dead and layer.rank >= 4]
    noise = [layer for layer in alive if layer.noise_rank == 0]
    if alive:
        middle = median(layer.noise_rank for layer in alive)
        more = f"; in {len(noise)} layers none do" if noise else ""
        yield f"{middle:g} singular values per layer (median) stand out from noise{more}"


def _dead_units(info: AdapterInfo) -> Iterator[str]:
    parts = (
        ("dead_directions", "of the r directions carry nothing"),
        ("dead_outputs", "output units are left exactly as they were"),
        ("dead_inputs", "input units are never read by the update"),
    )
    for attribute, what in parts:
        touched = [layer for layer in info.layers if not layer.dead and getattr(layer, attribute)]
        if touched:
            count = sum(getattr(layer, attribute) for layer in touched)
            words = _listed([f"{layer.name} ({getattr(layer, attribute)})" for layer in touched])
            yield f"{count} {what}, in {len(touched)} layers: {words}"


def _against_base(info: AdapterInfo) -> Iterator[str]:
    measured = [(layer, layer.base) for layer in info.layers if layer.base and not layer.dead]
    if not measured:
        return
    largest, against = max(measured, key=lambda pair: pair[1].relative_norm)
    middle = median(base.relative_norm for _, base in measured)
    yield (
        f"the update is {_percent(middle)} of its base weight's norm (median), "
        f"most in {largest.name}: {_percent(against.relative_norm)}"
    )
    factors = [base.amplification for _, base in measured if base.amplification is not None]
    if factors:
        yield f"in its own directions the update is {median(factors):.3g} times as strong as the base (median)"
    aligned = median(base.alignment_in / base.chance_in for _, base in measured if base.chance_in)
    share = _percent(median(base.alignment_in for _, base in measured))
    yield f"{share} of it reads the base's leading input directions, {aligned:.2g} times as much as chance (medians)"
    yield from _intruders(info)
    magnitudes = [base for layer, base in measured if base.has_magnitude]
    if magnitudes:
        yield (
            f"DoRA changed the magnitudes by {_percent(fmean(base.magnitude_change for base in magnitudes))} and the "
            f"directions by {fmean(base.direction_change for base in magnitudes):.2g} (mean of 1 - cosine)"
        )


def _intruders(info: AdapterInfo) -> Iterator[str]:
    measured = [layer for layer in info.layers if layer.base]
    intruded = [layer for layer in measured if layer.base and layer.base.intruders]
    partial = [layer for layer in measured if layer.base and not layer.base.svd_complete]
    against = "the base's leading ones, the only ones computed" if partial else "all of the base's"
    limit = f"below {intruders.COSINE:g} to {against}"
    if not intruded:
        yield f"no intruder dimension: of a tuned weight's top {intruders.TOP} singular vectors none has cosine {limit}"
        return
    count = sum(len(layer.base.intruders) for layer in intruded if layer.base)
    words = _listed([f"{layer.name} ({len(layer.base.intruders)})" for layer in intruded if layer.base])
    yield (
        f"{count} intruder dimensions (of a tuned weight's top {intruders.TOP} singular vectors, those with cosine "
        f"{limit}) in {len(intruded)} of {len(measured)} layers: {words}"
    )


def _names(here: str, there: str) -> tuple[str, str]:
    """Return the shortest endings of two paths that tell them apart."""
    parts = [PurePath(source).parts for source in (here, there)]
    for count in range(1, max(map(len, parts)) + 1):
        ours, theirs = ("/".join(path[-count:]) for path in parts)
        if ours != theirs:
            return ours, theirs
    return "the first", "the second"


def _compared(info: AdapterInfo, here: str, there: str) -> Iterator[str]:
    if info.comparison is None:
        return
    layers, whole = info.comparison.layers, info.comparison.interference
    difference = sum(layer.difference**2 for layer in layers) ** 0.5
    if difference <= 1e-12 * whole.norms[1]:
        yield f"the updates of {here} and {there} are equal in all {len(layers)} layers that both have"
        return
    relative = f", {_percent(difference / whole.norms[1])} of the norm of {there}" if whole.norms[1] else ""
    yield f"cosine {whole.cosine:.3f} between {here} and {there}; the difference is {difference:.3g}{relative}"
    yield f"added together, the two are {whole.verdict}: {whole.meaning}"
    similar, chance = median(layer.similarity for layer in layers), median(layer.chance for layer in layers)
    overlap = f"leading input subspaces overlap by {_percent(similar)}; chance gives {_percent(chance)} (medians)"
    same = [layer for layer in layers if layer.same_start]
    if 2 * len(same) > len(layers):
        learned = _percent(median(layer.learned_similarity for layer in same))
        by_chance = _percent(median(layer.learned_chance for layer in same))
        yield (
            f"in {len(same)} of {len(layers)} layers both began with the same A, as runs with one seed do, so their "
            f"input directions agree whatever was learned ({overlap}); the output directions, which began at zero, "
            f"overlap by {learned}; chance gives {by_chance} (medians): judge by these, or train with another seed"
        )
    else:
        yield overlap
    shared = [layer for layer in layers if layer.shared]
    if shared:
        words = _listed([f"{layer.name} ({layer.shared})" for layer in sorted(shared, key=lambda layer: -layer.shared)])
        count = sum(layer.shared for layer in shared)
        yield (
            f"{count} directions are shared (cosine above {SHARED_COSINE:g} on both sides) "
            f"in {len(shared)} of {len(layers)} layers: {words}"
        )
    for names, where in ((info.comparison.only_here, here), (info.comparison.only_there, there)):
        if names:
            yield f"{len(names)} layers are adapted only in {where}: {_listed(names)}"


def _by_module(info: AdapterInfo) -> dict[str, list[LayerInfo]]:
    groups: dict[str, list[LayerInfo]] = {}
    for layer in info.layers:
        groups.setdefault(layer.module, []).append(layer)
    return groups


def _listed(words: Sequence[str], most: int = 5) -> str:
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def _percent(share: float) -> str:
    """Format with one digit after the point, two significant ones below 1%, and never rounded up to a whole."""
    if share < 0.01:
        return f"{100 * share:.2g}%"
    rounded = f"{100 * share:.1f}%"
    return f"{int(share * 10_000) / 100:g}%" if rounded == "100.0%" and share < 1 else rounded
