"""Advice on ranks: what a trained adapter says about the rank that each of its layers needs.

The ranks are chosen as in resizing (`lorakit.adapters.combining.resize`). The advice makes no new adapter; it says
which ranks the config of the next training run should have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...adapters.combining.ranks import allocate, config_for_ranks, rank_pattern
from ...adapters.combining.report import UpdateReport
from ...adapters.combining.resize import ResizeConfig, plan_ranks
from ...adapters.config import LoraConfig
from ...adapters.low_rank import LowRank


@dataclass(frozen=True)
class RankAdvice:
    """A rank per layer.

    Attributes:
        report: the ranks, and how much of the trained update they would lose, layer by layer and in total.
        bound: upper bound on the share of the energy that any ranks within the same parameter budget could keep;
            `kept` itself if there was no budget.
    """

    report: UpdateReport
    bound: float

    @property
    def kept(self) -> float:
        """Share of the energy, the squared norm of all updates together, that these ranks keep."""
        return 1 - self.report.error**2

    @property
    def rank_pattern(self) -> dict[str, int]:
        """The layers whose rank is not `r`, as a LoraConfig takes them, without layers of rank 0."""
        return rank_pattern(self.report.ranks)[1]

    @property
    def r(self) -> int:
        """The most frequent rank."""
        return rank_pattern(self.report.ranks)[0]

    def lora_config(self, scaling: float = 1.0) -> LoraConfig:
        """Return a config that trains these ranks with one scaling in every layer; layers of rank 0 are not targeted.

        Raises:
            AdapterError: every rank is 0.
        """
        values = config_for_ranks(self.report.ranks).model_dump()
        values["lora_alpha"] *= scaling
        values["alpha_pattern"] = {key: alpha * scaling for key, alpha in values["alpha_pattern"].items()}
        return LoraConfig(**values)

    def __str__(self) -> str:
        pattern = "".join(f"\n  {key}: {rank}" for key, rank in self.rank_pattern.items())
        short = (
            f"\nno choice of ranks keeps more than {self.bound:.4%} within that budget"
            if self.bound > self.kept
            else ""
        )
        return (
            f"{self.report}\n{self.kept:.4%} of the energy is kept{short}\nr: {self.r}\nrank_pattern:{pattern or ' {}'}"
        )


def advise_ranks(
    updates: Mapping[str, LowRank],
    *,
    rank: int | None = None,
    energy: float | None = None,
    parameters: int | None = None,
) -> RankAdvice:
    """Return a rank for each layer of an adapter, given as module path -> update.

    Args:
        rank: the most that a layer gets.
        energy: least share of its squared norm that a layer keeps.
        parameters: budget of all layers together; spent on the directions with most energy per parameter.

    Raises:
        ConfigError: not exactly one of the three is given, or it is out of range.
    """
    config = ResizeConfig(rank=rank, energy=energy, parameters=parameters)
    report = plan_ranks(updates, config)
    bound = 1 - report.error**2
    if parameters is not None:
        values = {path: update.singular_values for path, update in updates.items()}
        prices = {path: sum(update.shape) for path, update in updates.items()}
        bound = max(bound, allocate(values, prices, parameters).bound)
    return RankAdvice(report, bound)
