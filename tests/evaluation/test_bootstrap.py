"""The bootstrap against closed forms, and at its edges."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import DataError
from lorakit.evaluation.bootstrap import bootstrap_interval, paired_difference


@pytest.mark.parametrize("confidence, z", [(0.95, 1.959964), (0.80, 1.281552)])
def test_interval_is_the_normal_approximation_for_many_rows(confidence, z):
    rows = np.random.default_rng(7).normal(50.0, 10.0, size=800)
    low, high = bootstrap_interval(rows, samples=6000, confidence=confidence)
    half = z * rows.std() / np.sqrt(len(rows))  # the bootstrap's variance of the mean is the biased one, divided by n
    assert low == pytest.approx(rows.mean() - half, abs=0.06 * half)
    assert high == pytest.approx(rows.mean() + half, abs=0.06 * half)


def test_interval_of_a_share_is_the_binomial_one():
    rows = np.repeat([0.0, 1.0], [120, 280])  # redrawn sums are exactly Binomial(400, 0.7): quantiles 262 and 298
    low, high = bootstrap_interval(rows, samples=20_000)
    assert low == pytest.approx(262 / 400, abs=1.01 / 400)
    assert high == pytest.approx(298 / 400, abs=1.01 / 400)


def test_chunked_drawing_covers_every_sample():
    rows = np.random.default_rng(0).normal(size=300_000)  # three samples fit in a chunk
    low, high = bootstrap_interval(rows, samples=40)
    assert low < rows.mean() < high
    assert high - low < 8 * rows.std() / np.sqrt(len(rows))


def test_same_seed_same_interval_other_seed_another():
    rows = np.random.default_rng(1).normal(size=50)
    assert bootstrap_interval(rows, seed=3) == bootstrap_interval(rows, seed=3)
    assert bootstrap_interval(rows, seed=3) != bootstrap_interval(rows, seed=4)


def test_one_row_and_equal_rows_have_no_width():
    assert bootstrap_interval([0.3]) == (0.3, 0.3)
    assert bootstrap_interval([0.1] * 7) == (0.1, 0.1)


@pytest.mark.parametrize(
    "rows, message",
    [([], "no held-out rows"), ([[1.0]], "shape"), ([0.0, float("nan")], "row 1"), ([float("inf")], "row 0")],
)
def test_rows_that_cannot_be_averaged_are_refused(rows, message):
    with pytest.raises(DataError, match=message):
        bootstrap_interval(rows)


def test_confidence_must_be_a_share():
    with pytest.raises(ValueError, match="95"):
        bootstrap_interval([1.0, 2.0], confidence=95)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_interval_lies_within_the_rows(rows):
    low, high = bootstrap_interval(rows, samples=100)
    slack = 1e-9 * max(1.0, max(map(abs, rows)))
    assert min(rows) - slack <= low <= high <= max(rows) + slack


def test_paired_difference_sees_what_two_intervals_hide():
    generator = np.random.default_rng(5)
    before = generator.normal(50.0, 20.0, size=100)  # rows differ much in difficulty
    after = before + generator.normal(1.0, 1.0, size=100)
    difference = paired_difference(before, after)
    assert difference.beyond_noise and 0.5 < difference.low < difference.value < difference.high < 1.5
    assert difference.value == pytest.approx((after - before).mean())
    assert bootstrap_interval(before)[1] > bootstrap_interval(after)[0]


def test_paired_difference_of_equal_scores_is_noise():
    difference = paired_difference([0.0, 1.0, 1.0], [0.0, 1.0, 1.0])
    assert (difference.value, difference.low, difference.high, difference.count) == (0.0, 0.0, 0.0, 3)
    assert not difference.beyond_noise


def test_paired_difference_needs_the_same_rows():
    with pytest.raises(DataError, match="3 and 2 rows"):
        paired_difference([1.0, 2.0, 3.0], [1.0, 2.0])
