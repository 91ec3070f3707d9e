"""An update against the weight that it changes: how large, whether along what the weight does already, and what is new.

The base weight is passed through once, in pieces of rows in float64; beyond that only its singular vectors are needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters.low_rank import LowRank
from .singular_vectors import SingularVectors, leading_vectors
from .spectrum import numerical_rank

INTRUDER_TOP = 10  # singular vectors of the tuned weight that are looked at, as in the paper
INTRUDER_COSINE = 0.5  # below it to every one of the base's, a singular vector counts as new


@dataclass(frozen=True)
class AgainstBase:
    """Δ against W, both (out, in). For DoRA the tuned weight is diag(m / ‖W + Δ‖) (W + Δ), norms by row; else W + Δ.

    Attributes:
        base_norm, base_spectral_norm: ‖W‖F and ‖W‖₂.
        relative_norm, relative_spectral_norm: ‖tuned - W‖F / ‖W‖F (of plain LoRA ‖Δ‖F / ‖W‖F), and ‖Δ‖₂ / ‖W‖₂.
        amplification: ‖Δ‖F / ‖Uᵀ W V‖F with U, V the singular vectors of Δ: by how much it strengthens what W does in
            its directions (Hu et al. 2021, arXiv:2106.09685, section 7.3); None for a zero update.
        alignment_out, alignment_in: share of ‖Δ‖F² within the span of W's leading left, right singular vectors, as many
            as Δ's rank, at most 64; chance_out, chance_in: of a random update.
        tuned_values, tuned_cosines: of the leading INTRUDER_TOP left singular vectors of the tuned weight, the singular
            value and the largest |cosine| to one of W's (Shuttleworth et al. 2024, arXiv:2410.21228, algorithm 1).
        magnitude_change: mean over rows of |‖tuned row‖ - ‖W row‖| / ‖W row‖, and
        direction_change: mean of 1 - cos(tuned row, W row) (Liu et al. 2024, arXiv:2402.09353, equations 3 and 4; there
            the magnitude's change is not relative).
        svd_error: bound on the singular values of W that were used, as a share of the largest.
        svd_complete: whether all singular vectors of W were compared, or the leading ones.
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
        """Intruder dimensions: positions, from 0, among the tuned weight's leading singular vectors that W has not."""
        return tuple(number for number, cosine in enumerate(self.tuned_cosines) if cosine < INTRUDER_COSINE)

    def row(self) -> dict[str, Any]:
        """Return the figures as columns of a table."""
        names = ["base_norm", "relative_norm", "relative_spectral_norm", "amplification", "alignment_out"]
        names += ["alignment_in", "magnitude_change", "direction_change"]
        return {name: getattr(self, name) for name in names} | {"intruders": len(self.intruders)}


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
    row_squares = torch.cat([rows.double().square().sum(1) for rows in weight.split(1024)])
    inner = ((u * s) * projected).sum(1)  # <row of Δ, row of W>
    tuned_squares = row_squares + 2 * inner + (u * s).square().sum(1)
    before, after = row_squares.sqrt(), tuned_squares.clamp(min=0).sqrt()
    target = after if magnitude is None else magnitude.double().flatten()
    scale = torch.ones_like(after) if magnitude is None else target / after.clamp(min=1e-300)
    cosine = (row_squares + inner) / (before * after).clamp(min=1e-300)
    is_real = (before > 0) & (after > 0)
    change = scale**2 * tuned_squares + row_squares - 2 * scale * (row_squares + inner)  # ‖tuned row - W row‖²
    if magnitude is None:
        change = (u * s).square().sum(1)  # the same without cancellation
    norm = float(row_squares.sum().sqrt())
    top = float(base.s[0]) if base.s.numel() else 0.0
    tuned = _tuned_vectors(update, weight, base, None if magnitude is None else scale)
    cosines = base.left_cosines(weight, tuned.u).amax(0).clamp(max=1) if top else tuned.s[:0]
    count = min(rank, base.s.numel())
    energy = s.square().sum().clamp(min=1e-300)
    along = float((u.T @ projected).norm())
    return AgainstBase(
        base_norm=norm,
        base_spectral_norm=top,
        relative_norm=float(change.clamp(min=0).sum().sqrt()) / norm if norm else 0.0,
        relative_spectral_norm=float(s[0]) / top if rank and top else 0.0,
        amplification=float(s.norm()) / along if along else None,
        alignment_out=float((base.u[:, :count].T @ (u * s)).square().sum() / energy),
        alignment_in=float((base.v[:, :count].T @ (v * s)).square().sum() / energy),
        chance_out=count / update.shape[0],
        chance_in=count / update.shape[1],
        tuned_values=tuple(tuned.s[: len(cosines)].tolist()),
        tuned_cosines=tuple(cosines.tolist()),
        magnitude_change=float(((target - before).abs() / before)[is_real].mean()) if is_real.any() else 0.0,
        direction_change=float((1 - cosine)[is_real].mean()) if is_real.any() else 0.0,
        svd_error=base.error / top if top else 0.0,
        svd_complete=base.complete,
        has_magnitude=magnitude is not None,
    )


def _tuned_vectors(update: LowRank, weight: Tensor, base: SingularVectors, scale: Tensor | None) -> SingularVectors:
    """Leading singular vectors of the tuned weight, looked for from those of the base and of the update."""
    matrix, up = weight.double() if base.complete else weight.float(), update.up
    if scale is not None:
        matrix, up = scale[:, None].to(matrix.dtype) * matrix, scale[:, None] * up
    is_wide = weight.shape[0] <= weight.shape[1]
    u, _, vh = update.svd
    known = torch.cat([base.u, u], dim=1) if is_wide else torch.cat([base.v, vh.T], dim=1)
    top = [
        *range(min(INTRUDER_TOP + 4, base.s.numel())),
        *range(base.s.numel(), min(base.s.numel() + 8, known.shape[1])),
    ]
    generator = torch.Generator().manual_seed(0)
    start = torch.cat([known[:, top], torch.randn(len(known), 4, generator=generator, dtype=torch.float64)], dim=1)
    k = min(INTRUDER_TOP, *weight.shape)
    return leading_vectors(matrix, k, start[:, : min(weight.shape)], (up, update.down))
