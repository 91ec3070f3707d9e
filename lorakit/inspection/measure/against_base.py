"""An update against the weight that it changes: how large it is, how far it follows the weight, and what is new.

The base weight is read once, in pieces of rows in float64; everything else needs only its singular vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...adapters.low_rank import LowRank
from .intruders import COSINE, tuned_cosines
from .singular_vectors import SingularVectors
from .spectrum import numerical_rank


@dataclass(frozen=True)
class AgainstBase:
    """Δ against W, both (out, in). For DoRA the tuned weight is diag(m / ‖W + Δ‖) (W + Δ), norms by row; else W + Δ.

    Attributes:
        base_norm, base_spectral_norm: ‖W‖F and ‖W‖₂.
        relative_norm, relative_spectral_norm: ‖tuned - W‖F / ‖W‖F (for plain LoRA ‖Δ‖F / ‖W‖F), and ‖Δ‖₂ / ‖W‖₂.
        amplification: ‖Δ‖F / ‖Uᵀ W V‖F with U, V the singular vectors of Δ: how much it amplifies W in its own
            directions (Hu et al. 2021, arXiv:2106.09685, section 7.3); None for a zero update.
        alignment_out, alignment_in: share of ‖Δ‖F² within the span of W's leading left, right singular vectors, as many
            as Δ's rank, at most 64; chance_out, chance_in: those of a random update.
        tuned_values, tuned_cosines: of the ten leading left singular vectors of the tuned weight, the singular
            value and the largest |cosine| to one of W's (Shuttleworth et al. 2024, arXiv:2410.21228, algorithm 1).
        magnitude_change: mean over rows of |‖tuned row‖ - ‖W row‖| / ‖W row‖.
        direction_change: mean over rows of 1 - cos(tuned row, W row) (Liu et al. 2024, arXiv:2402.09353, equations 3
            and 4; there the magnitude's change is not relative).
        svd_error: bound on the error of W's singular values used here, as a share of the largest.
        svd_complete: whether all singular vectors of W were compared, not only the leading ones.
        has_magnitude: whether the adapter is DoRA.
    """

    base_norm: float
    base_spectral_norm: float
    relative_norm: float
    relative_spectral_norm: float
    amplification: float | None
    alignment_out: float
    alignment_in: float
    chance_out: float
    chance_in: float
    tuned_values: tuple[float, ...]
    tuned_cosines: tuple[float, ...]
    magnitude_change: float
    direction_change: float
    svd_error: float
    svd_complete: bool
    has_magnitude: bool

    @property
    def intruders(self) -> tuple[int, ...]:
        """Intruder dimensions: positions, from 0, of the tuned weight's leading singular vectors that W lacks."""
        return tuple(number for number, cosine in enumerate(self.tuned_cosines) if cosine < COSINE)

    def row(self) -> dict[str, Any]:
        """Return the figures as columns of a table."""
        names = [
            "base_norm", "relative_norm", "relative_spectral_norm", "amplification", "alignment_out", "alignment_in",
            "magnitude_change", "direction_change",
        ]  # fmt: skip
        return {name: getattr(self, name) for name in names} | {"intruders": len(self.intruders)}


class RowChanges:
    """The change of each row of W, computed from its products with the same row of Δ.

    Args:
        base: ‖W row‖², (out,).
        inner: <W row, Δ row>, (out,).
        update: ‖Δ row‖², (out,).
        magnitude: DoRA's, (out,), or None.
    """

    def __init__(self, base: Tensor, inner: Tensor, update: Tensor, magnitude: Tensor | None) -> None:
        self._base, self._inner, self._update = base, inner, update
        self._before, self._after = base.sqrt(), (base + 2 * inner + update).clamp(min=0).sqrt()
        self._is_plain = magnitude is None
        self._target = self._after if magnitude is None else magnitude.double().flatten()
        self._nonzero = (self._before > 0) & (self._after > 0)

    @property
    def scale(self) -> Tensor:
        """m / ‖W + Δ‖, (out,); 1 without a magnitude."""
        return torch.where(self._after > 0, self._target / self._after, 1.0)

    @property
    def change(self) -> float:
        """‖tuned - W‖F."""
        if self._is_plain:
            return float(self._update.sum().sqrt())
        squares = self._target**2 + self._base - 2 * self.scale * (self._base + self._inner)
        return float(squares.clamp(min=0).sum().sqrt())

    @property
    def magnitude_change(self) -> float:
        """Mean of |‖tuned row‖ - ‖W row‖| / ‖W row‖."""
        return _mean(((self._target - self._before).abs() / self._before)[self._nonzero])

    @property
    def direction_change(self) -> float:
        """Mean of 1 - cos(tuned row, W row)."""
        return _mean((1 - (self._base + self._inner) / (self._before * self._after))[self._nonzero])


def compare_with_base(
    update: LowRank, weight: Tensor, base: SingularVectors, magnitude: Tensor | None = None
) -> AgainstBase:
    """Measure an update (float64) against its base weight (out, in), of any floating dtype.

    Args:
        base: the weight's singular vectors.
        magnitude: DoRA's, (out,).
    """
    u, s, vh = update.svd
    rank = numerical_rank(s)
    u, s, v = u[:, :rank], s[:rank], vh[:rank].T
    projected = torch.cat([rows.double() @ v for rows in weight.split(1024)])  # W V, (out, rank)
    squares = torch.cat([rows.double().square().sum(1) for rows in weight.split(1024)])
    rows = RowChanges(squares, ((u * s) * projected).sum(1), (u * s).square().sum(1), magnitude)
    norm = float(squares.sum().sqrt())
    top = float(base.s[0]) if base.s.numel() else 0.0
    values, cosines = tuned_cosines(update, weight, base, None if magnitude is None else rows.scale)
    count = min(rank, base.s.numel())
    energy = s.square().sum().clamp(min=1e-300)
    along = float((u.T @ projected).norm())
    return AgainstBase(
        base_norm=norm,
        base_spectral_norm=top,
        relative_norm=rows.change / norm if norm else 0.0,
        relative_spectral_norm=float(s[0]) / top if rank and top else 0.0,
        amplification=float(s.norm()) / along if along else None,
        alignment_out=float((base.u[:, :count].T @ (u * s)).square().sum() / energy),
        alignment_in=float((base.v[:, :count].T @ (v * s)).square().sum() / energy),
        chance_out=count / update.shape[0],
        chance_in=count / update.shape[1],
        tuned_values=tuple(values.tolist()),
        tuned_cosines=tuple(cosines.tolist()),
        magnitude_change=rows.magnitude_change,
        direction_change=rows.direction_change,
        svd_error=base.error / top if top else 0.0,
        svd_complete=base.complete,
        has_magnitude=magnitude is not None,
    )


def _mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else 0.0
