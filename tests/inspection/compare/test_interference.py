"""Meetings of two adapters against the dense definitions, and known answers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import THROUGH_CHOLESKY, assert_within, factored, of_factors, rounding
from torch import Tensor

from lorakit.adapters.low_rank import LowRank
from lorakit.errors import AdapterError
from lorakit.inspection.compare.interference import LEADING, interference

F64 = torch.float64


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, dtype=F64, generator=generator))[0]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[LowRank, LowRank]:
    """Two updates of one shape, of any ranks, deficient or zero; the second may share factors with the first."""
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    made = []
    for _ in range(2):
        rank = draw(st.integers(1, 6))
        up = torch.randn(rows, rank, dtype=F64, generator=generator)
        up[:, draw(st.integers(0, 6)) :] = 0
        made.append(LowRank(up, torch.randn(rank, columns, dtype=F64, generator=generator)))
    first, second = made
    if draw(st.booleans()):
        second = second + first.scaled(draw(st.sampled_from([1.0, -2.0, 0.1])))
    return first, second


def dense_spaces(update: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """Projections on the leading column and row space, from the full decomposition, and how far they may be off.

    An error of the update turns its leading spaces by that over the gap to the next singular value (Davis and Kahan).
    """
    u, s, vh = torch.linalg.svd(update.dense())
    bound, energies = of_factors(update.up, update.down), (s**2).cumsum(0)
    if s[0] <= bound:
        return u[:, :0] @ u[:, :0].T, vh[:0].T @ vh[:0], torch.zeros(())
    rank = int((energies < LEADING * energies[-1]).sum()) + 1
    gap = s[rank - 1] - torch.cat([s, s.new_zeros(1)])[rank]
    return u[:, :rank] @ u[:, :rank].T, vh[:rank].T @ vh[:rank], 2 * bound / gap


@settings(max_examples=150)
@given(pairs())
def test_everything_equals_the_dense_definition(pair: tuple[LowRank, LowRank]) -> None:
    found = interference({"x": pair[0]}, {"x": pair[1]}).layers[0]
    a, b = pair[0].dense(), pair[1].dense()
    for update, norm in zip(pair, found.norms, strict=True):
        assert_within(norm, update.dense().norm(), THROUGH_CHOLESKY * of_factors(update.up, update.down))
    sizes = [update.up.abs() @ update.down.abs() for update in pair]
    terms = a.numel() + pair[0].rank * pair[1].rank  # sums over all entries, or over all pairs of directions
    assert_within(found.dot, (a * b).sum(), 2 * rounding(terms, (sizes[0] * sizes[1]).sum(), F64))
    (column_a, row_a, turn_a), (column_b, row_b, turn_b) = map(dense_spaces, pair)
    for part, matrix, column, row, turn in (
        (found.meeting[0], a, column_b, row_b, turn_b), (found.meeting[1], b, column_a, row_a, turn_a)
    ):  # fmt: skip
        # On either side the space may turn, in a product that is squared.
        assert_within(
            part, (column @ matrix @ row).norm() ** 2, (4 * turn + rounding(36, 1.0, F64)) * matrix.norm() ** 2
        )
    for angles, p, q in ((found.column_angles, column_a, column_b), (found.row_angles, row_a, row_b)):
        assert len(angles) == min(found.ranks)
        cosines = torch.linalg.svdvals(p @ q)[: len(angles)].clamp(max=1)
        bound = turn_a + turn_b + rounding(factored(12, 12), 1.0, F64)
        assert_within(torch.tensor(angles, dtype=F64).cos(), cosines, bound)
        assert list(angles) == sorted(angles)
    # An update's part is no larger than the update, but for the roundings of either, relative to its norm.
    spread = [of_factors(update.up, update.down) / (update.dense().norm() or 1.0) for update in pair]
    off = THROUGH_CHOLESKY * max(map(float, spread))
    assert all(0 <= share <= 1 + 2 * off for share in found.shared)
    assert -1 - 2 * off <= found.cosine <= 1 + 2 * off


@given(pairs())
def test_a_meeting_has_no_order(pair: tuple[LowRank, LowRank]) -> None:
    forth = interference({"x": pair[0]}, {"x": pair[1]}).layers[0]
    back = interference({"x": pair[1]}, {"x": pair[0]}).layers[0]
    assert forth.verdict == back.verdict
    turns = [turn + THROUGH_CHOLESKY * of_factors(update.up, update.down) / (update.dense().norm() or 1.0)
             for update, (*_, turn) in ((update, dense_spaces(update)) for update in pair)]  # fmt: skip
    off = float(sum(turns)) + float(rounding(36, 1.0, F64))
    assert forth.shared == pytest.approx(back.shared[::-1], rel=0, abs=8 * off)
    sizes = [(update.up.norm() * update.down.norm()) / (update.dense().norm() or 1.0) for update in pair]
    of_dot = 2 * float(rounding(pair[0].rank * pair[1].rank + 24, sizes[0] * sizes[1], F64))
    assert forth.cosine == pytest.approx(back.cosine, rel=0, abs=of_dot + 2 * off)


def test_a_planted_shared_subspace_is_found() -> None:
    """Two of four columns are shared, at an angle of 0.3; the rows are foreign to each other."""
    q = orthonormal(40, 6, 0)
    tilted = math.cos(0.3) * q[:, 1] + math.sin(0.3) * q[:, 4]
    left_a, left_b = q[:, :3], torch.stack([q[:, 0], tilted, q[:, 5]], dim=1)
    rows = orthonormal(30, 6, 1)
    found = interference({"x": LowRank(left_a, rows[:, :3].T)}, {"x": LowRank(left_b, rows[:, 3:].T)}).layers[0]
    of_cosine = float(rounding(factored(40, 6), 1.0, F64))
    of_angle = math.sqrt(2 * of_cosine)  # a small angle is the root of what is missing from a cosine of 1
    assert found.column_angles == pytest.approx((0, 0.3, math.pi / 2), rel=0, abs=of_angle)
    assert found.row_angles == pytest.approx((math.pi / 2,) * 3, rel=0, abs=of_cosine)
    assert found.shared == pytest.approx((0, 0), abs=of_cosine)
    assert found.verdict == "independent"  # they write to the same place what they read in different ones


@pytest.mark.parametrize(
    ("mix", "verdict"),
    [
        ([[1, 0], [0, 1]], "aligned"),
        ([[-1, 0], [0, -0.5]], "opposed"),
        ([[0, 1], [-1, 0]], "entangled"),  # the same directions, read the other way round
    ],
)
def test_verdicts_where_both_act_in_the_same_directions(mix: list[list[float]], verdict: str) -> None:
    left, right = orthonormal(20, 2, 0), orthonormal(30, 2, 1)
    first = LowRank(left, right.T)
    second = LowRank(left @ torch.tensor(mix, dtype=F64), right.T)
    found = interference({"x": first}, {"x": second})
    assert found.verdict == found.layers[0].verdict == verdict
    assert_within(found.layers[0].shared[0], 1.0, rounding(factored(30, 2), 1.0, F64))


def test_random_updates_are_independent_and_meet_as_chance_says() -> None:
    generator = torch.Generator().manual_seed(0)
    made = [
        {
            f"layer{i}": LowRank(
                torch.randn(200, 8, dtype=F64, generator=generator), torch.randn(8, 300, dtype=F64, generator=generator)
            )
            for i in range(20)
        }
        for _ in range(2)
    ]
    found = interference(*made)
    assert found.verdict == "independent"
    squared = [math.cos(angle) ** 2 for layer in found.layers for angle in layer.column_angles]
    assert sum(squared) / len(squared) == pytest.approx(found.layers[0].chance[0], rel=0.1)


def test_a_tiny_layer_does_not_decide_for_the_whole() -> None:
    left, right = orthonormal(20, 4, 0), orthonormal(30, 4, 1)
    first = {"big": LowRank(left[:, :2], right[:, :2].T), "small": LowRank(left[:, :2] * 1e-3, right[:, :2].T)}
    second = {"big": LowRank(left[:, 2:], right[:, 2:].T), "small": LowRank(left[:, :2] * -1e-3, right[:, :2].T)}
    found = interference(first | {"mine": first["big"]}, second | {"theirs": first["big"]})
    assert [layer.verdict for layer in found.layers] == ["independent", "opposed"]
    assert found.verdict == "independent"
    assert found.alone == ["mine", "theirs"]
    assert str(found).startswith("independent: they act in different directions: their sum keeps both\ncosine -0.000;")
    assert "2 layers in both: 1 independent, 1 opposed; 2 in one only" in str(found)


def test_what_cannot_be_compared() -> None:
    small, large = LowRank(torch.ones(2, 1), torch.ones(1, 3)), LowRank(torch.ones(2, 1), torch.ones(1, 4))
    with pytest.raises(AdapterError, match="share no layer"):
        interference({"x": small}, {"y": small})
    with pytest.raises(AdapterError, match=r"x has updates of shapes \(2, 3\) and \(2, 4\)"):
        interference({"x": small}, {"x": large})
    zero = interference({"x": small.scaled(0)}, {"x": small}).layers[0]
    assert (zero.cosine, zero.shared, zero.column_angles) == (0, (0, 0), ())
