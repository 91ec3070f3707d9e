"""The learning rate's shape: a rise from above zero, half a cosine down, for any number of steps."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.training.schedule import learning_rate


def rates(steps: int, peak: float = 1.0, warmup: float = 0.1, least: float = 0.0) -> list[float]:
    return [learning_rate(step, steps, peak, warmup, least) for step in range(steps)]


def test_a_rise_then_half_a_cosine() -> None:
    got = rates(100, peak=2.0)
    assert got[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert got[10] == 2.0
    assert got[10:] == pytest.approx([1 + math.cos(math.pi * i / 90) for i in range(90)])
    assert got[55] == pytest.approx(1.0)  # half way down


def test_it_ends_near_its_least() -> None:
    assert rates(1000)[-1] < 1e-5
    assert rates(1000, least=0.1)[-1] == pytest.approx(0.1, abs=1e-5)
    assert set(rates(50, warmup=0.0, least=1.0)) == {1.0}


@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 0.999])
def test_a_single_step_trains(warmup: float) -> None:
    assert rates(1, warmup=warmup) == [1.0]


@given(
    st.integers(1, 400),
    st.floats(1e-6, 10),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1),
)
def test_for_any_settings_it_rises_to_the_peak_and_falls(steps: int, peak: float, warmup: float, least: float) -> None:
    got = rates(steps, peak, warmup, least)
    top = math.ceil(Fraction(repr(warmup)) * steps)
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in got)
    assert max(got) == pytest.approx(peak)
    assert got[:top] == sorted(got[:top]) and got[top:] == sorted(got[top:], reverse=True)
    assert all(rate >= least * peak * (1 - 1e-12) for rate in got[top:])


@pytest.mark.parametrize(("ratio", "steps", "expected"), [(0.07, 100, 7), (0.28, 25, 7), (0.1, 30, 3), (0.071, 100, 8)])
def test_the_rise_takes_the_steps_of_the_decimal_number(ratio: float, steps: int, expected: int) -> None:
    got = rates(steps, warmup=ratio)
    assert got.index(1.0) == expected - 1 and got[expected] == 1.0  # the fall begins with the peak
    assert got[:expected] == pytest.approx([(step + 1) / expected for step in range(expected)])
