"""The uncertainty of a mean over held-out rows: percentile bootstrap intervals, alone and paired.

A held-out set is a sample. Another hundred rows would have given another mean. The bootstrap (Efron 1979) redraws the
rows with replacement many times and reads the spread off the redrawn means. Two models are compared on the *same* rows
by their per-row differences. That removes the spread between easy and hard rows.

The interval has limits. With few rows it is too narrow: one row gives an interval of width zero. For a 0/1 metric, four
changes in one direction and none in the other are enough to exclude zero. `gate.verdict` therefore requires a minimum
number of rows before it calls anything a difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError

Scores = npt.NDArray[np.float64]  # one score per held-out row: shape (rows,)

DRAWS_AT_ONCE = 1_000_000  # row indices held in memory at a time: 8 MB


@dataclass(frozen=True)
class Difference:
    """Mean of `after - before` over the same rows, with its bootstrap interval.

    Attributes:
        value: the mean difference, in the metric's own unit; positive means `after` is higher.
        low, high: the interval's ends.
        count: the number of rows.
    """

    value: float
    low: float
    high: float
    count: int

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0.0 or self.high < 0.0


def bootstrap_interval(
    rows: npt.ArrayLike, samples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of `rows`.

    Args:
        rows: one finite number per held-out row, shape (rows,).
        samples: the number of redraws of the rows, with replacement.
        confidence: the interval's coverage, between 0 and 1.
        seed: the same seed, rows and samples give the same interval.

    Raises:
        DataError: there are no rows, they are not one-dimensional, or one of them is NaN or infinite.
    """
    values = _checked(rows)
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is a share between 0 and 1, got {confidence}")
    if values.min() == values.max():
        return float(values[0]), float(values[0])  # every redrawn mean is this value; summing would add rounding
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(_redrawn_means(values, samples, seed), [tail, 1.0 - tail])
    return float(low), float(high)


def paired_difference(
    before: npt.ArrayLike, after: npt.ArrayLike, samples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Difference:
    """Return the mean of `after - before`, row by row, with its percentile bootstrap interval.

    Args:
        before, after: scores of the same rows in the same order, both of shape (rows,).
        samples, confidence, seed: as in `bootstrap_interval`.

    Raises:
        DataError: as `bootstrap_interval`, or the two have different lengths.
    """
    first, second = _checked(before), _checked(after)
    if first.shape != second.shape:
        raise DataError(f"a paired comparison needs the same rows twice, got {len(first)} and {len(second)} rows")
    change = second - first
    low, high = bootstrap_interval(change, samples, confidence, seed)
    return Difference(float(change.mean()), low, high, len(change))


def _checked(rows: npt.ArrayLike) -> Scores:
    values: npt.NDArray[Any] = np.asarray(rows, dtype=np.float64)
    if values.ndim != 1:
        raise DataError(f"expected one score per row, shape (rows,), got shape {values.shape}")
    if not len(values):
        raise DataError("there are no held-out rows to score; an interval needs at least one")
    if not np.isfinite(values).all():
        index = int(np.flatnonzero(~np.isfinite(values))[0])
        raise DataError(f"the score of row {index} (counting from 0) is {values[index]}, expected a finite number")
    return values


def _redrawn_means(values: Scores, samples: int, seed: int) -> Scores:
    generator = np.random.default_rng(seed)
    per_chunk = max(1, DRAWS_AT_ONCE // len(values))
    chunks = []
    for start in range(0, samples, per_chunk):
        shape = (min(per_chunk, samples - start), len(values))
        chunks.append(values[generator.integers(0, len(values), size=shape)].mean(axis=1))
    return np.concatenate(chunks)
