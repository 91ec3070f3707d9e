"""`inspect_adapter`: measure an adapter, from its files or in a model, alone, against its base, or beside another."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from torch import nn

from ...errors import AdapterError
from ..compare.interference import together
from ..compare.similarity import Comparison, LayerSimilarity, compare_updates
from .against_base import compare_with_base
from .base_weights import BaseWeights
from .findings import findings
from .info import AdapterInfo
from .layer_info import LayerInfo, measure_update
from .module_paths import module_paths
from .singular_vectors import EXACT_UP_TO, SingularVectors, singular_vectors
from .updates import Updates

Source = str | os.PathLike[str] | nn.Module


def inspect_adapter(
    path_or_model: Source,
    base: Source | None = None,
    name: str = "default",
    vs: Source | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> AdapterInfo:
    """Measure every update of an adapter, layer by layer, in the memory of one layer.

    Args:
        path_or_model: a PEFT adapter folder, a run folder, or a model that carries the adapter.
        base: the base to measure the updates against: a checkpoint folder (16-bit or 4-bit), a known model's name, or a
            model. A model given as `path_or_model` is its own base.
        name: the adapter's, in models.
        vs: an adapter of another seed, rank, checkpoint or task to compare with, given like `path_or_model`.
        progress: called with (modules done, modules in all).

    Raises:
        AdapterError: there is no such adapter, or the two adapters share no layer or are of different base models.
        CheckpointError: a file is missing or broken, a number is not finite, or the base is not this adapter's base.
    """
    here = Updates(path_or_model, name)
    there = None if vs is None else Updates(vs, name)
    if base is None and isinstance(path_or_model, nn.Module):
        base = path_or_model
    weights = None if base is None else BaseWeights(base)
    if weights is not None and here.folder is not None:
        weights.check_base_of(here.folder)
    paths = list(dict.fromkeys([*here.paths, *(there.paths if there else ())]))
    parts, is_transposed = module_paths(paths), bool(here.config.get("fan_in_fan_out"))
    layers: list[LayerInfo] = []
    others: list[LayerInfo] = []
    similar: list[LayerSimilarity] = []
    for done, path in enumerate(paths, start=1):
        ours = here[path] if path in here.paths else []
        theirs = there[path] if there and path in there.paths else []
        vectors: SingularVectors | None = None  # of the base weight, computed once for all its updates
        for updates, measured in ((ours, layers), (theirs, others)):
            for update in updates:
                weight = weights.weight(update, is_transposed) if weights and update.is_whole else None
                against = None
                if weight is not None:
                    if min(weight.shape) <= EXACT_UP_TO:
                        weight = weight.double()  # once, for everything that follows
                    vectors = vectors or singular_vectors(weight)
                    against = compare_with_base(update.low_rank, weight, vectors, update.magnitude)
                measured.append(measure_update(update, parts[path], against))
        others_by_name = {update.name: update.low_rank for update in theirs}
        similar += [
            compare_updates(update.name, update.low_rank, others_by_name[update.name], update.kind == "embedding")
            for update in ours
            if update.name in others_by_name
        ]
        progress(done, len(paths))
    info = _info(here, layers, weights)
    if there is not None:
        comparison = _comparison(there.source, layers, others, similar)
        other = _info(there, others, weights)
        other = replace(other, findings=tuple(findings(other)))
        info = replace(info, other=other, comparison=comparison)
    return replace(info, findings=tuple(findings(info)))


def _info(updates: Updates, layers: list[LayerInfo], weights: BaseWeights | None) -> AdapterInfo:
    extras = tuple(updates.folder.extras) if updates.folder else ()
    return AdapterInfo(updates.source, tuple(layers), weights.name if weights else None, extras, updates.changed_base)


def _comparison(
    source: str, layers: list[LayerInfo], others: list[LayerInfo], similar: list[LayerSimilarity]
) -> Comparison:
    ours, theirs = ({layer.name: None for layer in side} for side in (layers, others))
    if not similar:
        raise AdapterError(
            f"{source} adapts none of the {len(ours)} layers that the other does (its first: {next(iter(theirs))})"
        )
    only_here = tuple(name for name in ours if name not in theirs)
    only_there = tuple(name for name in theirs if name not in ours)
    whole = together([layer.meeting for layer in similar], [*only_here, *only_there])
    return Comparison(source, tuple(similar), only_here, only_there, whole)
