"""The algebra on factors against the dense matrices, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import THROUGH_CHOLESKY, assert_within, factored, of_factors, rounding

from lorakit.adapters.low_rank import LowRank, added
from lorakit.errors import ShapeError

F64 = torch.float64
SIZES = st.integers(1, 12)


@st.composite
def updates(draw: st.DrawFn, count: int = 1) -> list[LowRank]:
    rows, columns = draw(SIZES), draw(SIZES)
    made = []
    for _ in range(count):
        rank, kept = draw(st.integers(0, 14)), draw(st.integers(0, 3))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
        up = torch.randn(rows, rank, dtype=torch.float64, generator=generator)
        up[:, kept:] *= draw(st.sampled_from([0.0, 1e-12, 1.0]))  # of lower rank than r, exactly or nearly
        made.append(LowRank(up, torch.randn(rank, columns, dtype=torch.float64, generator=generator)))
    return made


@given(updates(count=2), st.integers(0, 15))
def test_everything_equals_the_dense_definition(pair: list[LowRank], rank: int) -> None:
    a, b = pair
    dense, other = a.dense(), b.dense()
    k = len(a.singular_values)
    values = torch.linalg.svdvals(dense)
    bound = of_factors(a.up, a.down)
    assert_within(a.singular_values, values[:k], THROUGH_CHOLESKY * bound)
    u, s, vh = a.svd
    assert_within(u * s @ vh, dense, bound)
    assert_within(u.T @ u, torch.eye(k), rounding(factored(*a.shape), 1.0, F64))
    assert_within(a.norm(), dense.norm(), THROUGH_CHOLESKY * bound)
    sizes, others = ((x.up.abs() @ x.down.abs()) for x in (a, b))
    terms = dense.numel() + a.rank * b.rank  # sums over all entries, or over all pairs of directions
    assert_within(a.dot(b), (dense * other).sum(), 2 * rounding(terms, (sizes * others).sum(), F64))
    terms = 2 * a.rank + b.rank + 2
    assert_within((a + b).dense(), dense + other, 2 * rounding(terms, sizes + others, F64))
    assert_within((a - b).dense(), dense - other, 2 * rounding(terms, sizes + others, F64))
    assert_within(added([a, b, a]).dense(), 2 * dense + other, 2 * rounding(terms, 2 * sizes + others, F64))
    assert_within((a.truncated(rank).dense() - dense).norm(), values[rank:].norm(), 2 * bound)


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(3, 2\) and down \(3, 4\)"):
        LowRank(torch.zeros(3, 2), torch.zeros(3, 4))
    with pytest.raises(ShapeError, match=r"\(3, 4\) and \(4, 3\)"):
        LowRank(torch.zeros(3, 1), torch.zeros(1, 4)) + LowRank(torch.zeros(4, 1), torch.zeros(1, 3))


@pytest.mark.parametrize("smallest", [1e-2, 1e-6, 1e-12])
def test_small_singular_values_keep_their_digits(smallest: float) -> None:
    """Well conditioned factors take the quick way to their triangles, others the exact one."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 8, dtype=torch.float64)).Q for n in (60, 50))
    values = torch.logspace(0, math.log10(smallest), 8, dtype=torch.float64)
    update = LowRank(left * values, right.T)
    # Each column keeps its own digits through the triangles (Higham 2002, theorem 19.4), then 8 x 8 are decomposed.
    bound = rounding(factored(60, 8) + factored(50, 8), values, F64) + rounding(factored(8, 8), values[0], F64)
    assert_within(update.singular_values, values, bound * (THROUGH_CHOLESKY if smallest > 1 / 700 else 1))
    for triangle, factor in zip(update.triangles, (update.up, update.down.T), strict=True):
        gram_bound = rounding(factored(*factor.shape), factor.norm() ** 2, F64)
        assert_within(triangle.T @ triangle, factor.T @ factor, gram_bound)


def test_transposed_and_in_another_dtype() -> None:
    update = LowRank(torch.randn(5, 3, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64))
    assert torch.equal(update.T.dense(), update.dense().T)
    assert update.T.shape == (7, 5)
    single = update.to(torch.float32)
    assert torch.equal(single.up, update.up.float()) and torch.equal(single.down, update.down.float())
    assert update.to(torch.float64) is update and update.to(device="cpu") is update
    assert update.to(device="meta").up.is_meta and update.to(device="meta").up.dtype == torch.float64
