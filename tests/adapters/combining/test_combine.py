"""Combining adapters, against the dense definitions in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import THROUGH_CHOLESKY, assert_within, factored, matmul_rounding, of_factors, rounding
from torch import Tensor

from lorakit.adapters.combining import combine, rules
from lorakit.adapters.combining.combine import CombineConfig, combine_updates
from lorakit.adapters.combining.entrywise import RowBlocks, kth_magnitude, project
from lorakit.adapters.low_rank import LowRank, added
from lorakit.errors import AdapterError, ConfigError

F64 = torch.float64


def random_update(rows: int, columns: int, rank: int, seed: int, true_rank: int | None = None) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(rows, rank, dtype=F64, generator=generator)
    if true_rank is not None:
        up[:, true_rank:] = 0
    return LowRank(up, torch.randn(rank, columns, dtype=F64, generator=generator))


@st.composite
def adapters(draw: st.DrawFn) -> list[dict[str, LowRank]]:
    """Two or three adapters on some of three layers: ranks differ, some are zero or deficient."""
    shapes = [(draw(st.integers(1, 9)), draw(st.integers(1, 9))) for _ in range(3)]
    made = []
    for index in range(draw(st.integers(2, 3))):
        layers = draw(st.sets(st.integers(0, 2), min_size=1))
        made.append(
            {
                f"layer{layer}": random_update(
                    *shapes[layer], draw(st.integers(1, 6)), draw(st.integers(0, 999)) + index, draw(st.integers(0, 6))
                )
                for layer in sorted(layers)
            }
        )
    return made


WEIGHTS = st.lists(st.sampled_from([1.0, 0.5, -1.0, 0.3, 0.0]), min_size=3, max_size=3)


def dense_sum(sources: list[dict[str, LowRank]], weights: list[float], path: str) -> Tensor:
    return sum(weight * source[path].dense() for source, weight in zip(sources, weights, strict=True) if path in source)  # type: ignore[return-value]


def bound_of(sources: list[dict[str, LowRank]], weights: list[float], path: str) -> Tensor:
    """How far a sum of updates, its nearest matrices and their distances may be."""
    terms = [source[path].scaled(weight) for source, weight in zip(sources, weights, strict=True) if path in source]
    whole = added(terms)
    return of_factors(whole.up, whole.down)


@settings(max_examples=40)
@given(adapters(), WEIGHTS, st.one_of(st.none(), st.integers(1, 8)))
def test_the_weighted_sum_is_that_of_the_updates(
    sources: list[dict[str, LowRank]], weights: list[float], rank: int | None
) -> None:
    weights = weights[: len(sources)]
    result, report = combine_updates(sources, weights, CombineConfig(rank=rank), dtype=F64)
    assert set(result) == set().union(*sources)
    for layer in report.layers:
        expected = dense_sum(sources, weights, layer.path)
        values = torch.linalg.svdvals(expected)
        missing = (result[layer.path].dense() - expected).norm()
        best = values[layer.rank if rank else len(values) :].norm()
        bound = bound_of(sources, weights, layer.path)
        assert_within(missing, best, 2 * bound)
        assert_within(layer.norm, expected.norm(), THROUGH_CHOLESKY * bound)
        assert_within(layer.error * layer.norm, best, 2 * bound)
        assert layer.rank == result[layer.path].rank <= min(rank or 99, *expected.shape)


@settings(max_examples=40)
@given(adapters(), WEIGHTS)
def test_cat_and_svd_are_the_sum_with_and_without_all_of_its_rank(
    sources: list[dict[str, LowRank]], weights: list[float]
) -> None:
    weights = weights[: len(sources)]
    linear, _ = combine_updates(sources, weights, dtype=F64)
    cat, report = combine_updates(sources, weights, CombineConfig(method="cat"), dtype=F64)
    svd, svd_report = combine_updates(sources, weights, CombineConfig(method="svd"), dtype=F64)
    assert report.error == 0
    for layer in svd_report.layers:
        assert torch.equal(cat[layer.path].dense(), linear[layer.path].dense())
        assert layer.rank == min(*layer.shape, max(layer.ranks_before))
        whole = cat[layer.path].dense()
        missing = (svd[layer.path].dense() - whole).norm()
        best = torch.linalg.svdvals(whole)[layer.rank :].norm()
        assert_within(missing, best, 2 * bound_of(sources, weights, layer.path))


def test_equal_ranks_and_a_scaling_of_one_keep_the_bits_of_A() -> None:
    a, b = random_update(5, 7, 2, 0), random_update(5, 7, 3, 1)
    a, b = (update.to(torch.float32) for update in (a, b))
    result, _ = combine_updates([{"x": a}, {"x": b}], [1.0, 1.0])
    assert torch.equal(result["x"].down, torch.cat([a.down, b.down]))
    assert torch.equal(result["x"].up, torch.cat([a.up, b.up], dim=1))


def trimmed(update: LowRank, density: float) -> Tensor:
    dense = update.dense()
    kept = max(1, int(density * dense.numel()))
    return torch.where(dense.abs() >= dense.abs().flatten().sort(descending=True).values[kept - 1], dense, 0)


def elected(parts: list[Tensor]) -> Tensor:
    """TIES, one entry after the other."""
    result = torch.zeros_like(parts[0])
    for row, column in itertools.product(*map(range, result.shape)):
        values = [float(part[row, column]) for part in parts]
        agreeing = [value for value in values if value * sum(values) > 0]
        result[row, column] = sum(agreeing) / len(agreeing) if agreeing else 0
    return result


@settings(max_examples=40)
@given(adapters(), WEIGHTS, st.sampled_from([0.05, 0.2, 0.5, 0.9, 1.0]), st.sampled_from(["ties", "magnitude_prune"]))
def test_pruning_and_ties_by_their_definitions(
    sources: list[dict[str, LowRank]], weights: list[float], density: float, method: str
) -> None:
    """With full rank nothing is lost to the projection, so every entry of the definition comes out."""
    weights = weights[: len(sources)]
    result, report = combine_updates(sources, weights, CombineConfig(method=method, density=density, rank=9), dtype=F64)
    for layer in report.layers:
        parts = [w * trimmed(s[layer.path], density) for s, w in zip(sources, weights, strict=True) if layer.path in s]
        expected = elected(parts) if method == "ties" else torch.stack(parts).sum(0)
        bound = 2 * bound_of(sources, weights, layer.path)
        assert_within(result[layer.path].dense(), expected, bound)
        assert_within(layer.norm, expected.norm(), bound)


@settings(max_examples=40)
@given(adapters(), WEIGHTS, st.integers(1, 4), st.sampled_from(["ties", "magnitude_prune", "dare_linear"]))
def test_the_error_stated_is_the_distance(
    sources: list[dict[str, LowRank]], weights: list[float], rank: int, method: str
) -> None:
    weights, config = weights[: len(sources)], {"method": method, "density": 0.4}
    whole, _ = combine_updates(sources, weights, CombineConfig(**config, rank=9), dtype=F64)
    result, report = combine_updates(sources, weights, CombineConfig(**config, rank=rank), dtype=F64)
    for layer in report.layers:
        target = whole[layer.path].dense()
        distance = (result[layer.path].dense() - target).norm()
        bound = 2 * bound_of(sources, weights, layer.path) * (1 / 0.4 if method == "dare_linear" else 1)
        assert_within(layer.error * layer.norm, distance, bound)
        # So small a layer is decomposed in all of its directions, and the nearest is found.
        assert_within(distance, torch.linalg.svdvals(target)[rank:].norm(), bound)


def test_dare_keeps_entries_at_its_density_and_enlarges_them() -> None:
    update = random_update(60, 80, 4, 0)
    for method in ("dare_linear", "dare_ties"):
        config = CombineConfig(method=method, density=0.3, rank=60, seed=5)
        result, _ = combine_updates([{"x": update}], [2.0], config, dtype=F64)
        dense, expected = result["x"].dense(), 2 * update.dense() / 0.3
        bound = of_factors(update.scaled(2 / 0.3).up, update.down) + rounding(factored(80, 60), expected.norm(), F64)
        kept = dense.abs() > bound
        assert_within(dense[kept], expected[kept], bound)
        assert kept.double().mean() == pytest.approx(0.3, abs=0.03)  # 4800 entries: 4.5 standard deviations


def test_dare_is_the_update_on_average() -> None:
    update = random_update(12, 10, 2, 0)
    seeds = [CombineConfig(method="dare_linear", density=0.5, rank=10, seed=seed) for seed in range(400)]
    drawn = torch.stack([combine_updates([{"x": update}], [1.0], c, dtype=F64)[0]["x"].dense() for c in seeds])
    deviation = update.dense().abs() / 400**0.5  # of the mean: each entry is 0 or twice itself
    assert_within(drawn.mean(0), update.dense(), 5 * deviation + 2 * of_factors(update.up, update.down))


def test_dare_draws_by_seed_layer_and_adapter() -> None:
    update = random_update(20, 20, 3, 0)

    def masks(seed: int) -> list[Tensor]:
        config = CombineConfig(method="dare_linear", density=0.5, rank=20, seed=seed)
        both, _ = combine_updates([{"x": update, "y": update}], [1.0], config, dtype=F64)
        second, _ = combine_updates([{"z": update}, {"x": update}], [1.0, 1.0], config, dtype=F64)
        return [both["x"].dense(), both["y"].dense(), second["x"].dense()]

    first, again, other = masks(1), masks(1), masks(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for a, b in itertools.combinations([*first, other[0]], 2):
        assert not torch.allclose(a, b)


def test_dare_at_density_one_is_the_exact_sum() -> None:
    update = random_update(6, 5, 2, 0)
    result, report = combine_updates([{"x": update}], [1.5], CombineConfig(method="dare_linear", density=1), dtype=F64)
    assert_within(result["x"].dense(), 1.5 * update.dense(), 2 * matmul_rounding(1.5 * update.up, update.down, F64))
    assert report.error == 0


@settings(max_examples=40)
@given(
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(1, 50),
    st.sampled_from([torch.float32, F64]),
    st.integers(0, 99),
)
def test_the_threshold_is_exact_in_blocks(rows: int, columns: int, entries: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, dtype=dtype, generator=generator) * 10.0 ** torch.randint(
        -30, 9, (rows, columns), generator=generator
    ).to(dtype)
    matrix[torch.rand(rows, columns, generator=generator) < 0.3] = 0.5  # equal ones too
    blocks = RowBlocks((rows, columns), lambda start, stop: matrix[start:stop], entries)
    ordered = matrix.abs().flatten().sort(descending=True).values
    for k in {1, (matrix.numel() + 1) // 2, matrix.numel()}:
        assert kth_magnitude(blocks, k) == ordered[k - 1].item()


@pytest.mark.parametrize("decay", [0.0, 0.01, 0.05, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_the_projection_is_near_to_the_best(decay: float, dtype: torch.dtype) -> None:
    """From a flat spectrum, where no direction stands out, to a steep one."""
    generator = torch.Generator().manual_seed(1)
    left, _ = torch.linalg.qr(torch.randn(300, 200, dtype=F64, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(200, 200, dtype=F64, generator=generator))
    values = torch.exp(-decay * torch.arange(200.0, dtype=F64))
    matrix = (left * values @ right.T).to(dtype)
    found = project(RowBlocks((300, 200), lambda start, stop: matrix[start:stop], entries=7_000), 12)
    best, norm = float(values[12:].norm()), float(values.norm())
    up, down = found.update.up.double(), found.update.down.double()
    bound = rounding(factored(300, 200), norm, dtype)
    assert found.update.rank == 12
    assert_within(found.error, (up @ down - matrix.double()).norm(), bound)
    # A thousandth is where `project` ends; it drops directions whose squares are rounding noise.
    assert best - bound <= found.error <= best * 1.001 + torch.finfo(dtype).eps ** 0.5 * norm
    assert_within(found.norm, matrix.double().norm(), rounding(matrix.numel(), norm, F64))


def test_masks_do_not_need_the_whole_matrix() -> None:
    """No block that a rule is asked for has more entries than it may."""
    seen: list[int] = []
    update = random_update(100, 30, 2, 0)
    rows = rules.pruned(update, 0.5, entries=90)

    def counted(start: int, stop: int) -> Tensor:
        block = rows(start, stop)
        seen.append(block.numel())
        return block

    project(RowBlocks((100, 30), counted, entries=90), 3)
    assert max(seen) == 90


@pytest.mark.parametrize("shape", [(30, 12), (12, 30)], ids=str)
@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
def test_many_blocks_give_what_one_gives(method: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [{"x": random_update(*shape, 3, seed)} for seed in range(2)]
    config = CombineConfig(method=method, density=0.3, rank=4)
    one, report = combine_updates(sources, [1.0, -0.5], config, dtype=F64)
    monkeypatch.setattr(combine, "BLOCK_ENTRIES", 100)
    many, again = combine_updates(sources, [1.0, -0.5], config, dtype=F64)
    bound = 2 * bound_of(sources, [1.0, -0.5], "x")
    whole, _ = combine_updates(sources, [1.0, -0.5], config.model_copy(update={"rank": 12}), dtype=F64)
    s = whole["x"].singular_values
    assert_within(many["x"].dense(), one["x"].dense(), bound * (1 + s.norm() / (s[3] - s[4])))
    assert_within(again.error * again.norm, report.error * report.norm, bound)


def test_dare_in_many_blocks_draws_each_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combine, "BLOCK_ENTRIES", 200)
    update = LowRank(torch.ones(40, 1, dtype=F64), torch.ones(1, 20, dtype=F64))
    config = CombineConfig(method="dare_linear", density=0.5, rank=20)
    result, _ = combine_updates([{"x": update}], [1.0], config, dtype=F64)
    blocks = (result["x"].dense() > 1).split(10)
    assert len({tuple(block.flatten().tolist()) for block in blocks}) == 4


def test_what_cannot_be_combined_is_refused() -> None:
    small, large = {"x": random_update(3, 4, 1, 0)}, {"x": random_update(3, 5, 1, 0)}
    with pytest.raises(AdapterError, match=r"x has updates of different shapes: \(3, 4\).*\(3, 5\) in adapter 2"):
        combine_updates([small, large], [1, 1])
    with pytest.raises(AdapterError, match="2 adapters and 1 weights"):
        combine_updates([small, small], [1])
    broken = {"x": LowRank(torch.full((3, 1), float("nan")), torch.ones(1, 4))}
    with pytest.raises(AdapterError, match="x of adapter 2 holds inf or nan"):
        combine_updates([small, broken], [1, 1])
    for wrong in ({"method": "ties"}, {"density": 0.5}, {"method": "cat", "rank": 3}, {"method": "tie"}):
        with pytest.raises(ConfigError):
            CombineConfig(**wrong)
