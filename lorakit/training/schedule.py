"""The learning-rate schedule."""

from __future__ import annotations

import math
from fractions import Fraction


def learning_rate(step: int, steps: int, peak: float, warmup_ratio: float, min_ratio: float) -> float:
    """Return the learning rate of step 0 .. steps - 1: a linear rise to `peak`, then half a cosine to min_ratio * peak.

    The rise takes ceil(warmup_ratio * steps) steps and starts above zero: a step at zero would be wasted. The ratio
    counts as the decimal number that it was written as: 0.07 of 100 steps are 7, though the product of floats is more.
    """
    warmup = math.ceil(Fraction(repr(float(warmup_ratio))) * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * progress)) / 2)
