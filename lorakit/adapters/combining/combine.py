"""Combining adapters into one: the rules act on the true updates, not on their factors.

PEFT's "linear", "ties" and "dare" combine the A matrices and the B matrices separately and multiply the results, which
then hold products of one adapter's B with another's A. Here the rules combine the updates scaling · B A, whatever their
factors. The result becomes the nearest matrix of the wanted rank, and the report gives its distance.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

import torch
from pydantic import Field, model_validator
from torch import nn

from ...errors import AdapterError
from ...settings import Settings
from ..attach.add import check_name
from ..low_rank import LowRank
from . import rules
from .entrywise import BLOCK_ENTRIES, RowBlocks, project
from .report import LayerChange, UpdateReport
from .updates import FolderUpdates, attach_updates, check_one_base, model_updates, write_updates

Method = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
_Path = TypeVar("_Path", str, Path, os.PathLike[str])
_BY_ENTRIES = ("ties", "dare_linear", "dare_ties", "magnitude_prune")


class CombineConfig(Settings):
    """How adapters are combined.

        linear            Σ wᵢ Δᵢ; exact, or the nearest update of `rank`
        cat               the same, always exact: the rank is the sum of the ranks
        svd               the same, always brought to a rank: `rank`, or the largest among the adapters
        ties              of each Δᵢ the largest entries; of wᵢ Δᵢ the mean where signs agree (arXiv:2306.01708)
        dare_linear       entries dropped at random, the others enlarged; then the sum (arXiv:2311.03099)
        dare_ties         entries dropped at random, the others enlarged; then the mean where signs agree
        magnitude_prune   of each Δᵢ the largest entries; then the sum

    The last four give matrices of full rank. The new adapter holds the nearest update of `rank`, by default the largest
    rank that the layer has in the adapters. The report says how much that loses; for sparse matrices it is a lot.

    Raises:
        ConfigError: a density for a rule that takes none, no density for one that needs it, or a rank for "cat".
    """

    method: Method = Field("linear", description="rule that combines the updates")
    rank: int | None = Field(None, ge=1, description="rank of the result")
    density: float | None = Field(None, gt=0, le=1, description="share of the entries to keep")
    seed: int = Field(0, description="seed of DARE's random choice of entries")

    @model_validator(mode="after")
    def _fits(self) -> CombineConfig:
        if self.by_entries and self.density is None:
            raise ValueError(f"'{self.method}' needs a density, the share of the entries to keep")
        if not self.by_entries and self.density is not None:
            raise ValueError(f"'{self.method}' drops no entries; density is for {', '.join(_BY_ENTRIES)}")
        if self.method == "cat" and self.rank is not None:
            raise ValueError("'cat' keeps all ranks; 'linear' and 'svd' take a rank")
        return self

    @property
    def by_entries(self) -> bool:
        """Whether the rule acts on the entries of the updates."""
        return self.method in _BY_ENTRIES


def combine_updates(
    sources: Sequence[Mapping[str, LowRank]],
    weights: Sequence[float],
    config: CombineConfig | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, LowRank], UpdateReport]:
    """Combine adapters given as mappings, module path -> update; a layer that an adapter lacks counts as zero.

    "linear", "cat" and "svd" compute in float64 and take O((in + out) R²) with R the sum of the ranks. The others work
    block by block in float32, or in float64 if all of the layer's updates are. Their pruning threshold is exact, the
    (out, in) matrix is never completely in memory, and `entrywise.project` finds the best update of the wanted rank.

    Args:
        dtype: of the returned factors.

    Raises:
        AdapterError: there is nothing to combine, a layer has different shapes in two adapters, or an update holds inf
            or nan.
    """
    config = config or CombineConfig()
    if not sources or len(sources) != len(weights):
        raise AdapterError(f"{len(sources)} adapters and {len(weights)} weights: expected a weight for each, and one")
    combined: dict[str, LowRank] = {}
    layers = []
    for path in dict.fromkeys(path for source in sources for path in source):
        updates = {index: source[path] for index, source in enumerate(sources) if path in source}
        _check(path, updates)
        terms = [(update, weights[index], f"{config.seed}/{path}/{index}") for index, update in updates.items()]
        result, norm, error = _combine_layer(terms, config)
        combined[path] = result.to(dtype)
        ranks = tuple(updates[index].rank if index in updates else 0 for index in range(len(sources)))
        layers.append(LayerChange(path, result.shape, ranks, result.rank, norm, error / norm if norm else 0.0))
    return combined, UpdateReport(f"{config.method} of {len(sources)} adapters", layers)


def _combine_layer(terms: Sequence[tuple[LowRank, float, str]], config: CombineConfig) -> tuple[LowRank, float, float]:
    """Combine the (update, weight, seed) of one layer; return the result, the norm of the exact one, their distance."""
    updates, weights = [update for update, _, _ in terms], [weight for _, weight, _ in terms]
    largest = max(update.rank for update in updates)
    if not config.by_entries or (config.density == 1 and config.method in ("dare_linear", "magnitude_prune")):
        exact = rules.linear([update.to(torch.float64) for update in updates], weights)
        default = None if config.method in ("linear", "cat") else largest
        return truncate(exact, config.rank or default)
    rows, columns = updates[0].shape
    tall = [update.to(_entry_dtype(updates)) for update in updates]
    if is_wide := rows < columns:  # `project` needs tall matrices; a transpose has the same entries
        tall = [update.T for update in tall]
    combined = _combined_rows(
        [(update, weight, seed) for update, (_, weight, seed) in zip(tall, terms, strict=True)], config
    )
    matrix = RowBlocks(tall[0].shape, combined, _block_entries(len(tall)))
    nearest = project(matrix, min(config.rank or largest, rows, columns))
    return nearest.update.T if is_wide else nearest.update, nearest.norm, nearest.error


def truncate(update: LowRank, rank: int | None) -> tuple[LowRank, float, float]:
    """Return the nearest update of at most `rank`, the norm of `update` and the distance between them.

    With None the rank is that of `update`, but at most the smaller dimension of its matrix.
    """
    most = min(update.shape)
    rank = most if rank is None else min(rank, most)
    if rank >= update.rank:
        return update, float(update.norm()), 0.0
    values = update.svd[1]
    return update.truncated(rank), float(values.norm()), float(values[rank:].norm())


def _combined_rows(terms: Sequence[tuple[LowRank, float, str]], config: CombineConfig) -> rules.RowReader:
    """Return a reader of the rows of the matrix that a rule of entries gives."""
    assert config.density is not None
    entries = _block_entries(len(terms))
    weights = [weight for _, weight, _ in terms]
    if config.method.startswith("dare"):
        thinned = [rules.dropped(update, config.density, seed) for update, _, seed in terms]
    else:
        thinned = [rules.pruned(update, config.density, entries) for update, _, _ in terms]
    join = rules.elected if config.method.endswith("ties") else rules.summed
    return join(thinned, weights)


def _block_entries(count: int) -> int:
    return BLOCK_ENTRIES // count  # a block of each adapter is in memory at once


def _entry_dtype(updates: Sequence[LowRank]) -> torch.dtype:
    return torch.float64 if all(update.up.dtype == torch.float64 for update in updates) else torch.float32


def _check(path: str, updates: Mapping[int, LowRank]) -> None:
    shapes = {update.shape for update in updates.values()}
    if len(shapes) > 1:
        listed = ", ".join(f"{update.shape} in adapter {index + 1}" for index, update in updates.items())
        raise AdapterError(f"{path} has updates of different shapes: {listed}; are they of one base model?")
    for index, update in updates.items():
        if not all(torch.isfinite(factor).all() for factor in (update.up, update.down)):
            raise AdapterError(f"{path} of adapter {index + 1} holds inf or nan")


def combine_adapters(
    model: nn.Module,
    weights: Mapping[str, float],
    name: str,
    method: Method = "linear",
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> UpdateReport:
    """Combine adapters of a model into a new one, and make it active; the sources stay as they are.

    Args:
        weights: adapter -> weight, which may be negative: `{"tuned": 1, "before": -1}` is the difference of the two.
        method, rank, density, seed: as in `CombineConfig`.
        dtype: of the new A and B.

    Raises:
        AdapterError: an adapter does not exist, is DoRA or holds more than low-rank updates; or the name is taken. The
            model is then unchanged.
        ConfigError: as `CombineConfig`.
    """
    config = CombineConfig(method=method, rank=rank, density=density, seed=seed)
    check_name(model, name)
    sources = [model_updates(model, source) for source in weights]
    updates, report = combine_updates(sources, list(weights.values()), config, dtype)
    attach_updates(model, updates, name, dtype)
    return replace(report, title=_title(config, weights))


def combine_folders(
    weights: Mapping[_Path, float],
    path: str | os.PathLike[str],
    method: Method = "linear",
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> UpdateReport:
    """Do the same with adapters in folders, without their model, and write the new one to `path` in PEFT's format.

    Raises:
        AdapterError: as `combine_adapters`, the adapters are of different base models, or `path` holds something that
            is not an adapter.
        CheckpointError: a file is missing or broken.
        StorageError: writing failed; whatever was at `path` is untouched.
    """
    config = CombineConfig(method=method, rank=rank, density=density, seed=seed)
    sources = [FolderUpdates(source) for source in weights]
    check_one_base(sources)
    updates, report = combine_updates(sources, list(weights.values()), config, dtype)
    write_updates(path, updates, sources, dtype)
    return replace(report, title=_title(config, {os.fspath(source): weight for source, weight in weights.items()}))


def _title(config: CombineConfig, weights: Mapping[str, float]) -> str:
    terms = " + ".join(f"{weight:g} x {name}" for name, weight in weights.items())
    density = f", density {config.density:g}" if config.density else ""
    return f"{config.method}{density}: {terms}"
