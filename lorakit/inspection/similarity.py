"""Two updates of one layer compared: between ranks, seeds, checkpoints or adapters, from their factors alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters.low_rank import LowRank
from ..errors import ShapeError
from .spectrum import numerical_rank, rank_for_energy

SHARED_COSINE = 0.9  # a direction of one update within 26 degrees of the other's counts as shared
SHARED_ENERGY = 0.9  # of each update; its weaker directions are left out of the count


@dataclass(frozen=True)
class LayerSimilarity:
    """The update of one layer in adapter `a` against that in adapter `b`.

    Attributes:
        name: module path.
        cosine: <Δa, Δb> / (‖Δa‖ ‖Δb‖), 1 for the same direction; 0 where one is zero.
        norm_a, norm_b: Frobenius norms.
        difference: ‖Δa - Δb‖F.
        similarity: φ of the leading directions that hold SHARED_ENERGY of each, on the input side as in the paper (Hu
            et al. 2021, arXiv:2106.09685, section 7.2); chance: of random subspaces.
        shared: of those, how many directions both have, on the input and on the output side.
        cosines_in, cosines_out: cosines of the principal angles between those subspaces, in falling order.
        change: singular values of Δa - Δb.
    """

    name: str
    cosine: float
    norm_a: float
    norm_b: float
    difference: float
    similarity: float
    chance: float
    shared: int
    cosines_in: tuple[float, ...]
    cosines_out: tuple[float, ...]
    change: tuple[float, ...]

    @property
    def relative_difference(self) -> float | None:
        """‖Δa - Δb‖F / ‖Δb‖F; None where Δb alone is zero."""
        if not self.difference:
            return 0.0
        return self.difference / self.norm_b if self.norm_b else None

    def row(self) -> dict[str, Any]:
        """Return the figures as one row of a table."""
        names = (
            "name",
            "cosine",
            "norm_a",
            "norm_b",
            "difference",
            "relative_difference",
            "similarity",
            "chance",
            "shared",
        )
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Comparison:
    """Two adapters, layer by layer.

    Attributes:
        source: where the other adapter is from.
        layers: the layers that both adapt.
        only_here, only_there: layers that one of them adapts.
    """

    source: str
    layers: tuple[LayerSimilarity, ...]
    only_here: tuple[str, ...]
    only_there: tuple[str, ...]

    @property
    def cosine(self) -> float:
        """Cosine of the two adapters as wholes, over the layers both have."""
        inner = sum(layer.cosine * layer.norm_a * layer.norm_b for layer in self.layers)
        norms = [sum(getattr(layer, side) ** 2 for layer in self.layers) for side in ("norm_a", "norm_b")]
        product: float = (norms[0] * norms[1]) ** 0.5
        return inner / product if product else 0.0


def subspace_similarity(a: Tensor, b: Tensor) -> Tensor:
    """φ(i, j) = ‖Uiᵀ Uj‖F² / min(i, j) for the leading i columns of `a` and j of `b` (arXiv:2106.09685, equation 4).

    Shapes:
        a (n, p), b (n, q), each with orthonormal columns -> (p, q), entry (i-1, j-1); 1 where one contains the other,
        max(i, j) / n on average for random subspaces.
    """
    overlap = (a.T @ b).square().cumsum(0).cumsum(1)
    i = torch.arange(1, a.shape[1] + 1, dtype=overlap.dtype)
    j = torch.arange(1, b.shape[1] + 1, dtype=overlap.dtype)
    return overlap / torch.minimum(i[:, None], j)


def principal_cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of the principal angles between the spans of orthonormal columns (Björck and Golub 1973), falling."""
    cosines: Tensor = torch.linalg.svdvals(a.T @ b)
    return cosines.clamp(max=1)


def compare_updates(name: str, a: LowRank, b: LowRank) -> LayerSimilarity:
    """Compare two updates of one shape, both in float64.

    Raises:
        ShapeError: the shapes differ.
    """
    if a.shape != b.shape:
        raise ShapeError(f"{name}: updates of shapes {a.shape} and {b.shape} belong to different base models")
    (ua, sa, va), (ub, sb, vb) = a.svd, b.svd
    norm_a, norm_b = float(sa.norm()), float(sb.norm())
    change = (a - b).singular_values
    i, j = (min(rank_for_energy(s, SHARED_ENERGY), numerical_rank(s)) for s in (sa, sb))
    cosines_in, cosines_out = principal_cosines(va[:i].T, vb[:j].T), principal_cosines(ua[:, :i], ub[:, :j])
    smaller = min(i, j)
    inner = float(((ua.T @ ub) * (va @ vb.T) * sa[:, None] * sb).sum())
    return LayerSimilarity(
        name=name,
        cosine=max(-1.0, min(1.0, inner / (norm_a * norm_b))) if norm_a and norm_b else 0.0,
        norm_a=norm_a,
        norm_b=norm_b,
        difference=float(change.norm()),
        similarity=float(cosines_in.square().sum()) / smaller if smaller else 0.0,
        chance=max(i, j) / a.shape[1],
        shared=min(int((side > SHARED_COSINE).sum()) for side in (cosines_in, cosines_out)),
        cosines_in=tuple(cosines_in.tolist()),
        cosines_out=tuple(cosines_out.tolist()),
        change=tuple(change.tolist()),
    )
