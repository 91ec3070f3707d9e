"""Intruder dimensions: leading singular vectors of the tuned weight that resemble none of the base weight's.

Shuttleworth et al. 2024, "LoRA vs full fine-tuning: an illusion of equivalence", arXiv:2410.21228, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...adapters.low_rank import LowRank
from .singular_vectors import SingularVectors, complete_vectors, leading_vectors

TOP = 10  # singular vectors of the tuned weight to examine, as in the paper
COSINE = 0.5  # a singular vector whose cosine to each of the base's is below this counts as new


def tuned_cosines(
    update: LowRank, weight: Tensor, base: SingularVectors, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the tuned weight's TOP singular values, and each left vector's largest |cosine| to one of W's, both (k,).

    Args:
        update: Δ, (out, in), float64.
        weight: W, (out, in).
        base: its singular vectors.
        scale: DoRA's m / ‖W + Δ‖ by row, (out,): the tuned weight is diag(scale) (W + Δ).
    """
    k = min(TOP, *weight.shape)
    if not base.s.numel():
        return weight.new_zeros(0), weight.new_zeros(0)
    if base.complete and scale is None:
        s, cosines = _within_base_vectors(update, weight, base, k)
    else:
        tuned = _decompose(update, weight, base, scale, k)
        s, cosines = tuned.s[:k], base.left_cosines(weight, tuned.u[:, :k])
    return s, cosines.amax(0).clamp(max=1)  # algorithm 1: max over i of |<u_i of W, u_j of the tuned weight>|


def _within_base_vectors(update: LowRank, weight: Tensor, base: SingularVectors, k: int) -> tuple[Tensor, Tensor]:
    """Return the tuned weight's k singular values, and the cosines of their left vectors to W's, (known, k).

    In the basis of W's singular vectors, the tuned weight's square is a diagonal matrix plus one of rank 2 r.

    With W = U S Vᵀ and Δ = L D Rᵀ, for W wider than high (U complete):

        Uᵀ (W + Δ)(W + Δ)ᵀ U = S² + p qᵀ + q pᵀ + q qᵀ,    p = Uᵀ W R,  q = Uᵀ L D

    For W higher than wide, V and (W + Δ)ᵀ(W + Δ) take their place, with p = Vᵀ Wᵀ L D, q = Vᵀ R and the last term
    q D² qᵀ. The left vectors then follow from the right ones: Uᵀ u' = (S y + S⁻¹ p (qᵀ y)) / s' with y = Vᵀ v'.
    """
    assert base.basis is not None and base.all_values is not None
    left, d, right = update.svd
    matrix, is_wide = weight.double(), weight.shape[0] <= weight.shape[1]
    if is_wide:
        p, q = base.basis.T @ (matrix @ right.T), base.basis.T @ (left * d)
        inner = q @ q.T
    else:
        p, q = base.basis.T @ (matrix.T @ (left * d)), base.basis.T @ right.T
        inner = (q * d.square()) @ q.T
    square = torch.diag(base.all_values.square()) + p @ q.T + q @ p.T + inner
    values, vectors = torch.linalg.eigh(square)
    s, y = values.flip(0)[:k].clamp(min=0).sqrt(), vectors.flip(1)[:, :k]
    known = base.known
    if is_wide:
        cosines = y[known].abs()
    else:
        along = base.all_values[known, None]
        cosines = (along * y[known] + (p[known] / along) @ (q.T @ y)).abs() / s.clamp(min=1e-300)
    return s, cosines


def _decompose(update: LowRank, weight: Tensor, base: SingularVectors, scale: Tensor | None, k: int) -> SingularVectors:
    if base.complete:
        tuned = weight.double() + update.dense()
        return complete_vectors(tuned if scale is None else scale[:, None] * tuned)
    up, matrix = update.up, weight.float()
    if scale is not None:
        up, matrix = scale[:, None] * up, scale[:, None].float() * matrix
    left, _, right = update.svd
    is_wide = weight.shape[0] <= weight.shape[1]
    known = [base.u[:, : k + 4], left[:, :8]] if is_wide else [base.v[:, : k + 4], right[:8].T]
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(min(weight.shape), 4, generator=generator, dtype=torch.float64)
    return leading_vectors(matrix, k, torch.cat([*known, random], dim=1), (up, update.down))
