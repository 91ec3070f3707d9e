"""The singular values of each update as it grows, through QR of A and B: the update itself is never formed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .matrices import Adapted


def effective_rank(singular_values: Tensor) -> float:
    """Return exp of the entropy of the values taken as shares of their sum (Roy and Vetterli 2007, eq. 1 to 3).

    1 where one value is all, k where k are equal, 0 where all are zero.
    """
    total = singular_values.sum()
    if total == 0:
        return 0.0
    return float(torch.special.entr(singular_values / total).sum().exp())


def spectral_figures(adapted: Sequence[Adapted]) -> dict[str, list[float]]:
    """Return delta_norm, ‖scaling B A‖, and effective_rank of each update, computed in float64."""
    values = [one.update().singular_values for one in adapted]
    return {"delta_norm": [float(s.norm()) for s in values], "effective_rank": [effective_rank(s) for s in values]}
