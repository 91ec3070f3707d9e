"""Advice on ranks: the same ranks that resizing gives, and a config that trains them."""

from __future__ import annotations

import pytest
import torch
from tolerances import THROUGH_CHOLESKY, assert_within, factored, rounding
from torch import Tensor

from lorakit.adapters.attach.targeting import pattern_value
from lorakit.adapters.combining.resize import ResizeConfig, resize_updates
from lorakit.adapters.low_rank import LowRank
from lorakit.inspection.compare.advice import advise_ranks

F64 = torch.float64


def with_values(rows: int, columns: int, values: list[float], seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, len(values), dtype=F64, generator=generator))[0] for size in (rows, columns)
    )
    return LowRank(left * torch.tensor(values, dtype=F64), right.T)


@pytest.fixture
def updates() -> dict[str, LowRank]:
    return {
        "layers.0.q": with_values(20, 20, [5, 1, 0.1, 0.01], 0),
        "layers.1.q": with_values(20, 20, [4, 3, 2, 1], 1),
        "layers.0.k": with_values(10, 20, [0.1, 0.0, 0.0, 0.0], 2),
        "layers.1.k": with_values(10, 20, [0.0, 0.0, 0.0, 0.0], 3),
    }


def test_planted_ranks_are_found(updates: dict[str, LowRank]) -> None:
    advice = advise_ranks(updates, energy=0.999)
    assert advice.report.ranks == {"layers.0.q": 2, "layers.1.q": 4, "layers.0.k": 1, "layers.1.k": 0}
    config = advice.lora_config(scaling=2.0)
    assert "layers.1.k" not in config.target_modules
    for path in config.target_modules:
        rank = pattern_value(config.rank_pattern, path, config.r)
        assert rank == advice.report.ranks[path]
        assert config.scaling(rank, pattern_value(config.alpha_pattern, path, config.lora_alpha)) == 2.0


@pytest.mark.parametrize("how", [{"rank": 2}, {"energy": 0.9}, {"parameters": 100}, {"parameters": 170}], ids=str)
def test_advice_is_what_resizing_does(updates: dict[str, LowRank], how: dict[str, float]) -> None:
    advice = advise_ranks(updates, **how)
    resized, report = resize_updates(updates, ResizeConfig(**how), dtype=F64)
    assert advice.report == report

    def flat(of: dict[str, LowRank]) -> Tensor:
        return torch.cat([of[path].dense().flatten() for path in updates])

    lost = (flat(resized) - flat(updates)).norm() / flat(updates).norm()
    bound = THROUGH_CHOLESKY * rounding(factored(20, 4), 1.0, F64)  # of shares of the energy
    assert_within(advice.kept, 1 - float(lost) ** 2, 2 * bound)
    assert advice.bound >= advice.kept
    for path, rank in report.ranks.items():
        assert not rank or pattern_value(advice.rank_pattern, path, advice.r) == rank


def test_the_advice_in_words(updates: dict[str, LowRank]) -> None:
    text = str(advise_ranks(updates, parameters=150))
    assert "resized to at most 150 parameters\n3 layers, ranks 1 to 2; 150 parameters, 560 before" in text
    assert "r: 1\nrank_pattern:\n  layers.1.q: 2" in text
    assert "no choice of ranks keeps more than" in text
