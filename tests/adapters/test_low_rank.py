"""The algebra on factors against the dense matrices, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.adapters.low_rank import LowRank, added
from lorakit.errors import ShapeError

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
    scale = 1 + float(values.max()) * 1e-13
    torch.testing.assert_close(a.singular_values, values[:k], rtol=0, atol=1e-12 * scale)
    u, s, vh = a.svd
    torch.testing.assert_close(u * s @ vh, dense, rtol=0, atol=1e-12 * scale)
    torch.testing.assert_close(u.T @ u, torch.eye(k, dtype=u.dtype), rtol=0, atol=1e-12)
    torch.testing.assert_close(a.norm(), dense.norm())
    torch.testing.assert_close(a.dot(b), (dense * other).sum(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((a + b).dense(), dense + other)
    torch.testing.assert_close((a - b).dense(), dense - other)
    torch.testing.assert_close(added([a, b, a]).dense(), 2 * dense + other)
    lost = (a.truncated(rank).dense() - dense).norm()
    torch.testing.assert_close(lost, values[rank:].norm(), rtol=1e-9, atol=1e-11)


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(3, 2\) and down \(3, 4\)"):
        LowRank(torch.zeros(3, 2), torch.zeros(3, 4))
    with pytest.raises(ShapeError, match=r"\(3, 4\) and \(4, 3\)"):
        LowRank(torch.zeros(3, 1), torch.zeros(1, 4)) + LowRank(torch.zeros(4, 1), torch.zeros(1, 3))


@pytest.mark.parametrize("smallest", [1e-2, 1e-6, 1e-12])
def test_small_singular_values_keep_their_digits(smallest):
    """Well conditioned factors take the quick way to their triangles, others the exact one."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 8, dtype=torch.float64)).Q for n in (60, 50))
    values = torch.logspace(0, math.log10(smallest), 8, dtype=torch.float64)
    update = LowRank(left * values, right.T)
    torch.testing.assert_close(update.singular_values, values, rtol=1e-15 / smallest, atol=1e-15)
    for triangle, factor in zip(update.triangles, (update.up, update.down.T), strict=True):
        torch.testing.assert_close(triangle.T @ triangle, factor.T @ factor, rtol=0, atol=1e-14)


def test_transposed_and_in_another_dtype() -> None:
    update = LowRank(torch.randn(5, 3, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64))
    assert torch.equal(update.T.dense(), update.dense().T)
    assert update.T.shape == (7, 5)
    single = update.to(torch.float32)
    assert torch.equal(single.up, update.up.float()) and torch.equal(single.down, update.down.float())
    assert update.to(torch.float64) is update and update.to(device="cpu") is update
    assert update.to(device="meta").up.is_meta and update.to(device="meta").up.dtype == torch.float64
