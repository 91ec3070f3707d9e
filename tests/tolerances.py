"""How far a rounded result may be from the exact one: bounds that follow from the arithmetic, not from a trial.

A number rounded to a dtype is off by at most u = eps / 2 of itself. A sum of n products therefore is off by at most
n·u·Σ|a||b|, whatever the order of addition and whoever adds (Higham 2002, Accuracy and Stability of Numerical
Algorithms, eq. 3.5). That grows too fast for long sums: their roundings go either way, and the bound
λ·sqrt(n)·u·Σ|a||b| holds with probability 1 - 2·n·exp(-λ²/2) (Higham and Mary 2019, doi:10.1137/18M1226312).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LONG = 1024  # terms, beyond which the probable bound is taken: with n up to 10^7 it fails once in 10^15
LAMBDA = 10.0


def unit(dtype: torch.dtype) -> float:
    """Return u, the largest relative error of one rounding to the dtype."""
    return torch.finfo(dtype).eps / 2


def rounding(terms: int, magnitude: Tensor | float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return how far a sum of `terms` products may be from the exact one, float64.

    Args:
        terms: roundings that a summand goes through at most; sums that follow each other add their numbers.
        magnitude: Σ|a||b| of each result, or the largest.
        dtype: of the accumulator.
    """
    growth = float(terms) if terms <= LONG else LAMBDA * math.sqrt(terms)
    return growth * unit(dtype) * torch.as_tensor(magnitude, dtype=torch.float64).detach()


def matmul_rounding(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32, more: int = 1) -> Tensor:
    """Return `rounding` of each element of a @ b; `more` counts the roundings besides those of the sum."""
    return rounding(a.shape[-1] + more, a.detach().double().abs() @ b.detach().double().abs(), dtype)


def assert_within(found: Tensor, exact: Tensor, bound: Tensor | float) -> None:
    """Assert that each element of `found` is at most `bound` from that of `exact`, of the same shape."""
    assert found.shape == exact.shape, (found.shape, exact.shape)
    error = (found.detach().double() - exact.detach().double()).abs()
    allowed = torch.as_tensor(bound, dtype=torch.float64).detach().expand(error.shape)
    off = ~(error <= allowed)  # so that nan is off
    assert not off.any(), (
        f"{int(off.sum())} of {off.numel()} are off, by up to {float(error[off].max()):.3g} "
        f"where {float(allowed[off].max()):.3g} is allowed"
    )
