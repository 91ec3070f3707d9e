"""Ranks within budgets, against brute force; resized updates, against the dense definitions."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tolerances import THROUGH_CHOLESKY, assert_within, of_factors, rounding
from torch import Tensor

from lorakit.adapters.attach.targeting import pattern_value
from lorakit.adapters.combining.ranks import allocate, config_for_ranks, rank_for_energy, rank_pattern
from lorakit.adapters.combining.resize import ResizeConfig, resize_updates
from lorakit.adapters.low_rank import LowRank
from lorakit.errors import AdapterError, ConfigError

F64 = torch.float64
VALUES = st.lists(st.integers(0, 9), min_size=0, max_size=4).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=F64)
)
LAYERS = st.lists(VALUES, min_size=1, max_size=4).map(lambda values: {str(i): v for i, v in enumerate(values)})


def best_by_brute_force(values: dict[str, Tensor], prices: dict[str, int], budget: int) -> float:
    choices = itertools.product(*(range(len(v) + 1) for v in values.values()))
    affordable = (c for c in choices if sum(n * p for n, p in zip(c, prices.values(), strict=True)) <= budget)
    return max(sum(float((v[:n] ** 2).sum()) for v, n in zip(values.values(), c, strict=True)) for c in affordable)


@given(LAYERS, st.lists(st.integers(1, 7), min_size=4, max_size=4), st.integers(0, 40))
def test_an_allocation_against_all_others(values: dict[str, Tensor], price_list: list[int], budget: int) -> None:
    prices = dict(zip(values, price_list, strict=False))
    found = allocate(values, prices, budget)
    total = sum(float((v**2).sum()) for v in values.values()) or 1.0
    kept = sum(float((values[path][:rank] ** 2).sum()) for path, rank in found.ranks.items())
    best = best_by_brute_force(values, prices, budget)
    assert found.parameters == sum(found.ranks[path] * prices[path] for path in values) <= budget
    if total > 0 and any(float(v.sum()) for v in values.values()):
        assert found.kept == kept / total  # squares of whole numbers, whose sums are exact
        assert found.kept <= best / total <= found.bound
    largest = max((float(v[0]) ** 2 for v in values.values() if len(v)), default=0.0)
    assert best - kept <= largest  # never further off than one direction
    if found.kept == found.bound or len(set(prices.values())) == 1:
        assert kept == best


@example({"0": torch.tensor([2.0], dtype=F64), "1": torch.tensor([4.0], dtype=F64)}, [1, 4, 1, 1], 4)  # worth as much
@given(LAYERS, st.lists(st.integers(1, 7), min_size=4, max_size=4), st.integers(0, 40))
@example({"a": torch.tensor([2.0], dtype=F64), "b": torch.tensor([4.0], dtype=F64)}, [1, 4], 4)  # of equal worth
def test_what_greedy_spends_it_spends_best(values: dict[str, Tensor], price_list: list[int], budget: int) -> None:
    """Of a budget that is spent to the last parameter before anything was too dear, no other choice keeps more."""
    prices = dict(zip(values, price_list, strict=False))
    offers = [(float(x) ** 2 / prices[p], prices[p]) for p, v in values.items() for x in v if x > 0]
    offers.sort(key=lambda offer: -offer[0])  # stable, as `allocate` sorts: of equals the first layer's comes first
    spent = list(itertools.accumulate(price for _, price in offers))
    exact = max((s for s in spent if s <= budget), default=0)
    found = allocate(values, prices, exact)
    kept = sum(float((values[path][:rank] ** 2).sum()) for path, rank in found.ranks.items())
    assert kept == best_by_brute_force(values, prices, exact)


def test_where_greedy_is_not_best_the_bound_says_so() -> None:
    values = {"a": torch.tensor([1.8], dtype=F64), "b": torch.tensor([1.4, 1.4], dtype=F64)}
    found = allocate(values, {"a": 3, "b": 2}, 4)  # a alone keeps 3.24; the two of b would have kept 3.92
    assert found.ranks == {"a": 1, "b": 0}
    assert_within(found.kept, 3.24 / 7.16, rounding(8, 1.0, F64))
    assert_within(found.bound, (3.24 + 1.96 / 2) / 7.16, rounding(8, 1.0, F64))


@given(VALUES, st.floats(0.01, 1.0))
def test_the_least_rank_for_a_share_of_the_energy(values: Tensor, share: float) -> None:
    energies = [float(value) ** 2 for value in values if value > 0]
    expected = next((k for k in range(1, len(energies) + 1) if sum(energies[:k]) >= share * sum(energies)), 0)
    assert rank_for_energy(values, share) == expected


def test_rounding_noise_is_not_a_direction() -> None:
    values = torch.tensor([1.0, 0.5, 1e-17, 1e-18], dtype=F64)
    assert rank_for_energy(values, 1.0) == 2
    assert allocate({"x": values}, {"x": 10}, 1000).ranks == {"x": 2}


PATHS = st.dictionaries(
    st.sampled_from(["q", "a.q", "b.a.q", "layers.1.q", "layers.11.q", "layers.1.k", "enc.layers.1.q", "k"]),
    st.integers(0, 4),
    min_size=1,
)


@given(PATHS)
def test_a_pattern_gives_every_layer_its_rank(ranks: dict[str, int]) -> None:
    r, pattern = rank_pattern(ranks)
    sorted_as_peft_writes = dict(sorted(pattern.items()))
    for path, rank in ranks.items():
        if rank:
            assert pattern_value(pattern, path, r) == rank
            assert pattern_value(sorted_as_peft_writes, path, r) == rank
            by_peft = next((v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", path)), r)
            assert by_peft == rank
    if any(ranks.values()):
        config = config_for_ranks(ranks)
        assert {path for path, rank in ranks.items() if rank} == set(config.target_modules)
        for path in config.target_modules:
            assert config.scaling(ranks[path], pattern_value(config.alpha_pattern, path, config.lora_alpha)) == 1
    else:
        with pytest.raises(AdapterError, match="nothing is left"):
            config_for_ranks(ranks)


def test_a_pattern_is_short_where_names_say_it() -> None:
    ranks = {f"layers.{i}.{name}": rank for i in range(3) for name, rank in (("q", 8), ("k", 2), ("v", 8))}
    assert rank_pattern(ranks) == (8, {"k": 2})
    assert rank_pattern(ranks | {"layers.1.k": 4}) == (8, {"layers.0.k": 2, "layers.1.k": 4, "layers.2.k": 2})


@st.composite
def adapters(draw: st.DrawFn) -> dict[str, LowRank]:
    made = {}
    for index in range(draw(st.integers(1, 3))):
        rows, columns, rank = draw(st.integers(1, 10)), draw(st.integers(1, 10)), draw(st.integers(1, 6))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
        up = torch.randn(rows, rank, dtype=F64, generator=generator)
        up[:, draw(st.integers(0, 6)) :] = 0
        made[f"layer{index}"] = LowRank(up, torch.randn(rank, columns, dtype=F64, generator=generator))
    return made


HOW = st.one_of(
    st.builds(ResizeConfig, rank=st.integers(1, 7)),
    st.builds(ResizeConfig, energy=st.floats(0.05, 1.0)),
    st.builds(ResizeConfig, parameters=st.integers(1, 150)),
)


@settings(max_examples=100)
@given(adapters(), HOW)
def test_a_resized_update_is_the_nearest_and_its_loss_is_stated(updates: dict[str, LowRank], how: ResizeConfig) -> None:
    resized, report = resize_updates(updates, how, dtype=F64)
    if how.parameters is not None:
        assert report.parameters <= how.parameters
    bounds = []
    for layer in report.layers:
        dense = updates[layer.path].dense()
        values = torch.linalg.svdvals(dense)
        missing = (resized[layer.path].dense() - dense).norm()
        bound = 2 * of_factors(updates[layer.path].up, updates[layer.path].down)
        assert_within(missing, values[layer.rank :].norm(), bound)
        assert layer.rank == resized[layer.path].rank
        assert_within(layer.error * layer.norm, missing, THROUGH_CHOLESKY * bound)
        bounds.append(THROUGH_CHOLESKY * bound)
        if how.energy is not None:
            assert layer.error**2 <= 1 - how.energy + rounding(16, 1.0, F64)
    whole = torch.cat([update.dense().flatten() for update in updates.values()])
    lost = torch.cat([(resized[path].dense() - update.dense()).flatten() for path, update in updates.items()])
    assert_within(report.error * float(whole.norm()), lost.norm(), torch.stack(bounds).norm())


def test_the_report_in_words() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(20, 3, dtype=F64, generator=generator))[0] for _ in range(2))
    updates = {"a.q": LowRank(left * torch.tensor([4.0, 3.0, 0.1]), right.T), "a.k": LowRank(left * 0, right.T)}
    _, report = resize_updates(updates, ResizeConfig(energy=0.9))
    assert str(report) == (
        "resized to 0.9 of each layer's energy\n"
        "1 layers, ranks 2; 80 parameters, 240 before\n"
        "relative error of the update: 2.00e-02\n"
        "the largest errors are in:\n"
        "  a.q: rank 3 -> 2, error 2.00% of the layer's update\n"
        "1 layers are not in the new adapter"
    )


@pytest.mark.parametrize("wrong", [{}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 1.5}, {"parameters": 0}])
def test_a_size_is_one_of_three(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        ResizeConfig(**wrong)
