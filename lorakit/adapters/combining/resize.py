"""Resizing an adapter: to one rank, to a share of each layer's energy, or to a budget of parameters for all layers."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ...settings import Settings
from ..attach.add import check_name
from ..low_rank import LowRank
from .combine import truncate
from .ranks import allocate, rank_for_energy
from .report import LayerChange, UpdateReport
from .updates import FolderUpdates, attach_updates, model_updates, write_updates


class ResizeConfig(Settings):
    """How to resize an adapter; give exactly one of these settings.

    Raises:
        ConfigError: none is given, or several are.
    """

    rank: int | None = Field(None, ge=1, description="highest rank of a layer")
    energy: float | None = Field(None, gt=0, le=1, description="least share of its squared norm that each layer keeps")
    parameters: int | None = Field(None, ge=1, description="largest number of parameters in all A and B together")

    @model_validator(mode="after")
    def _one(self) -> ResizeConfig:
        if sum(value is not None for value in (self.rank, self.energy, self.parameters)) != 1:
            raise ValueError("give one of rank, energy and parameters")
        return self

    def __str__(self) -> str:
        if self.parameters is not None:
            return f"at most {self.parameters:,} parameters"
        return f"rank {self.rank}" if self.rank is not None else f"{self.energy:.4g} of each layer's energy"


def chosen_ranks(
    singular_values: Mapping[str, Tensor], prices: Mapping[str, int], config: ResizeConfig
) -> dict[str, int]:
    """Return layer -> rank from each update's singular values, (k,) in falling order; 0 leaves the layer out.

    Args:
        prices: layer -> in + out, the parameters that one rank costs.
    """
    if config.parameters is not None:
        return allocate(singular_values, prices, config.parameters).ranks
    if config.energy is not None:
        return {path: rank_for_energy(values, config.energy) for path, values in singular_values.items()}
    return {path: min(config.rank or 0, len(values)) for path, values in singular_values.items()}


def plan_ranks(updates: Mapping[str, LowRank], config: ResizeConfig) -> UpdateReport:
    """Return the rank of each layer and the error of its update, from the singular values in float64."""
    values: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, int]] = {}
    before: dict[str, int] = {}
    for path, update in updates.items():  # if they are on disk, only one is in memory at a time
        values[path] = update.to(torch.float64).singular_values
        shapes[path], before[path] = update.shape, update.rank
    ranks = chosen_ranks(values, {path: sum(shape) for path, shape in shapes.items()}, config)
    layers = []
    for path, rank in ranks.items():
        norm, missing = float(values[path].norm()), float(values[path][rank:].norm())
        relative = missing / norm if norm else 0.0
        layers.append(LayerChange(path, shapes[path], (before[path],), rank, norm, relative))
    return UpdateReport(f"resized to {config}", layers)


def resize_updates(
    updates: Mapping[str, LowRank], config: ResizeConfig, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, LowRank], UpdateReport]:
    """Return each layer's nearest update of the chosen rank (Eckart-Young), in `dtype`, and a report of the errors.

    It computes in float64. A layer that keeps its rank keeps its factors.
    """
    report = plan_ranks(updates, config)
    resized = {}
    for path, rank in report.ranks.items():
        resized[path] = truncate(updates[path].to(torch.float64), rank)[0].to(dtype)
    return resized, report


def resize_adapter(
    model: nn.Module,
    source: str,
    name: str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    parameters: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> UpdateReport:
    """Attach a smaller copy of an adapter under a new name and make it active; the source stays as it is.

    Args:
        rank, energy, parameters: one of them, as in `ResizeConfig`. A budget goes to the directions, in all layers,
            that hold the most energy per parameter (`ranks.allocate`); a layer that gets none is left out.
        dtype: of the new A and B.

    Raises:
        AdapterError: there is no such adapter, it is DoRA or holds more than low-rank updates, the name is taken, or
            nothing of it is left. The model is then unchanged.
        ConfigError: as `ResizeConfig`.
    """
    config = ResizeConfig(rank=rank, energy=energy, parameters=parameters)
    check_name(model, name)
    updates, report = resize_updates(model_updates(model, source), config, dtype)
    attach_updates(model, updates, name, dtype)
    return report


def resize_folder(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    parameters: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> UpdateReport:
    """Do the same with an adapter in a folder, without its model, and write the new one to `path` in PEFT's format.

    Raises:
        AdapterError: as `resize_adapter`, or `path` holds something that is not an adapter.
        CheckpointError: a file is missing or broken.
        StorageError: writing failed; whatever was at `path` is untouched.
    """
    config = ResizeConfig(rank=rank, energy=energy, parameters=parameters)
    adapter = FolderUpdates(source)
    updates, report = resize_updates(adapter, config, dtype)
    write_updates(path, updates, [adapter], dtype)
    return report
