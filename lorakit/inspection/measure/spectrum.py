"""What a list of singular values says about an update: ranks, energies and how much of it stands out from noise.

Every function takes the singular values S of one matrix in falling order, as a float64 tensor (k,). Every rank of the
zero matrix is 0.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

RANK_TOLERANCE = 1e-6  # of the largest: rounding of factors stored in fp32 leaves no larger singular value
_TRACY_WIDOM = 2.0234  # the 99% quantile of its law for real matrices


def effective_rank(s: Tensor) -> float:
    """exp of the entropy of S / ΣS, S (k,), from 1 to k (Roy and Vetterli 2007, "The effective rank", definition 1)."""
    share = s[s > 0] / s.sum()
    return float(torch.exp(-(share * share.log()).sum())) if share.numel() else 0.0


def stable_rank(s: Tensor) -> float:
    """‖Δ‖F² / ‖Δ‖₂² of S (k,) (Rudelson and Vershynin 2007, arXiv:math/0503442): small noise hardly changes it."""
    return float((s / s[0]).square().sum()) if s.numel() and s[0] > 0 else 0.0


def numerical_rank(s: Tensor) -> int:
    """Return the number of singular values (k,) above RANK_TOLERANCE times the largest."""
    return int((s > RANK_TOLERANCE * s[0]).sum()) if s.numel() else 0


def energy(s: Tensor, k: int) -> float:
    """Return the share of ‖Δ‖F² in the top k of S (n,), which the best update of rank k keeps (Eckart and Young 1936).

    It is 1 for Δ = 0.
    """
    total = s.square().sum()
    return float(s[:k].square().sum() / total) if total > 0 else 1.0


def noise_rank(s: Tensor, out: int) -> int:
    """Count the singular values above noise's largest in 99 of 100 cases (Marchenko, Pastur 1967; Johnstone 2001).

    In an orthonormal basis of its row space the update is an (out, k) matrix with the same singular values. If its
    entries were independent with deviation d, the largest would be near the bulk's edge d(√out + √k). The Tracy-Widom
    law's 99% quantile bounds how far above it can come (Johnstone, "On the distribution of the largest eigenvalue",
    theorem 1.1). d is estimated from the median (Gavish and Donoho 2014, arXiv:1305.5870, section III.E), so that a
    rank above k / 2 is underestimated.
    """
    k = s.numel()
    if k < 2 or not s[0] > 0:
        return numerical_rank(s)
    long, short = max(out, k), min(out, k)
    variance = float(s.median()) ** 2 / (long * _median(short / long))
    edge = math.sqrt(long) + math.sqrt(short)
    spread = edge * (1 / math.sqrt(long) + 1 / math.sqrt(short)) ** (1 / 3)
    limit = math.sqrt(variance * (edge**2 + _TRACY_WIDOM * spread))
    return int((s > max(limit, RANK_TOLERANCE * float(s[0]))).sum())


@cache
def _median(beta: float) -> float:
    """Return the median of the Marchenko-Pastur law with ratio beta <= 1 and unit variance, by the trapezoidal rule."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    # x = middle - radius · cos(angle), so that no slope is infinite at the ends.
    angle = torch.linspace(0, math.pi, 20_001, dtype=torch.float64)
    x = (low + high) / 2 - (high - low) / 2 * angle.cos()
    density = ((high - x) * (x - low)).clamp(min=0).sqrt() / x.clamp(min=1e-300) * angle.sin()
    total = torch.cumulative_trapezoid(density, angle)
    return float(x[1:][(total < total[-1] / 2).sum()])
