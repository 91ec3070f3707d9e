"""Comparing two updates of one layer, of other ranks, seeds, checkpoints or adapters, from their factors alone.

`interference` gives the angles and the effect of adding the two. This module adds how far one has moved from the other,
and the subspace similarity of the LoRA paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, hypot
from typing import Any

import torch
from torch import Tensor

from ...adapters.low_rank import LowRank
from ...printed import Printed
from .interference import Interference, LayerMeeting, layer_meeting

SAME_START = 0.5  # cosine of the drawn factors; between two draws it is about 1 / sqrt(elements)
SHARED_COSINE = 0.9  # a direction of one update within 26 degrees of the other's counts as shared


@dataclass(frozen=True, repr=False)
class LayerSimilarity(Printed):
    """The update of one layer in adapter `a` against that in adapter `b`.

    Attributes:
        name: module path.
        meeting: norms, cosine, principal angles of the leading directions, and the verdict on a sum of the two.
        change: singular values of Δa - Δb.
        drawn_cosine: cosine between the two A, of embeddings between the two B: the factor that a start draws, while
            the other begins at zero. It stays near 1 where both began with the same draw, and is near 0 elsewhere.
        is_embedding: whether B is the drawn one.
    """

    name: str
    meeting: LayerMeeting
    change: tuple[float, ...]
    drawn_cosine: float = 0.0
    is_embedding: bool = False

    @property
    def cosine(self) -> float:
        """<Δa, Δb> / (‖Δa‖ ‖Δb‖), 1 for the same direction; 0 where one is zero."""
        return max(-1.0, min(1.0, self.meeting.cosine))

    @property
    def difference(self) -> float:
        """‖Δa - Δb‖F."""
        return hypot(*self.change)

    @property
    def relative_difference(self) -> float | None:
        """‖Δa - Δb‖F / ‖Δb‖F; None where only Δb is zero."""
        if not self.difference:
            return 0.0
        return self.difference / self.meeting.norms[1] if self.meeting.norms[1] else None

    @property
    def cosines_in(self) -> tuple[float, ...]:
        """Cosines of the principal angles between the leading input directions, in falling order."""
        return tuple(map(cos, self.meeting.row_angles))

    @property
    def similarity(self) -> float:
        """φ of the leading input directions, as in the paper (Hu et al. 2021, arXiv:2106.09685, section 7.2).

        The leading directions of each hold 90% of its energy; `chance` is φ for as many random directions.
        """
        cosines = self.cosines_in
        return sum(cosine**2 for cosine in cosines) / len(cosines) if cosines else 0.0

    @property
    def chance(self) -> float:
        """Mean `similarity` of random subspaces."""
        return self.meeting.chance[1]

    @property
    def same_start(self) -> bool:
        """Whether both began with the same draw, which makes one side of both alike whatever they learned."""
        return self.drawn_cosine >= SAME_START

    @property
    def learned_similarity(self) -> float:
        """φ of the leading directions on the side that begins at zero: the output, of embeddings the input."""
        angles = self.meeting.row_angles if self.is_embedding else self.meeting.column_angles
        return sum(cos(angle) ** 2 for angle in angles) / len(angles) if angles else 0.0

    @property
    def learned_chance(self) -> float:
        """Mean `learned_similarity` of random subspaces."""
        return self.meeting.chance[1 if self.is_embedding else 0]

    @property
    def shared(self) -> int:
        """Leading directions that both have (cosine above SHARED_COSINE), on the input and on the output side."""
        sides = (self.meeting.row_angles, self.meeting.column_angles)
        return min(sum(cos(angle) > SHARED_COSINE for angle in side) for side in sides)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.meeting.verdict}, cosine {self.cosine:+.3f}, difference {self.difference:.3g}, input "
            f"overlap {self.similarity:.1%} (chance {self.chance:.1%}), {self.shared} shared directions"
        )

    def row(self) -> dict[str, Any]:
        """Return the figures as one row of a table."""
        names = (
            "name", "cosine", "difference", "relative_difference", "similarity", "chance", "shared", "same_start",
            "learned_similarity", "learned_chance",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names} | {"verdict": self.meeting.verdict}


@dataclass(frozen=True, repr=False)
class Comparison(Printed):
    """Two adapters, layer by layer.

    Attributes:
        source: where the other adapter is from.
        layers: the layers that both adapt.
        only_here, only_there: layers that only one of them adapts.
        interference: the layers that both adapt as a whole, and the effect of adding the adapters.
    """

    source: str
    layers: tuple[LayerSimilarity, ...]
    only_here: tuple[str, ...]
    only_there: tuple[str, ...]
    interference: Interference

    def __str__(self) -> str:
        return f"compared with {self.source}: {self.interference}"


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


def compare_updates(name: str, a: LowRank, b: LowRank, is_embedding: bool = False) -> LayerSimilarity:
    """Compare two updates of one shape, both in float64.

    Args:
        is_embedding: whether they are of an embedding, whose start draws B and not A.

    Raises:
        AdapterError: the shapes differ.
    """
    meeting = layer_meeting(name, a, b)
    drawn = (a.up.T, b.up.T) if is_embedding else (a.down, b.down)
    return LayerSimilarity(name, meeting, tuple((a - b).singular_values.tolist()), _cosine(*drawn), is_embedding)


def _cosine(a: Tensor, b: Tensor) -> float:
    """Cosine between the rows that two matrices (r, n) both have, as one vector; 0 where one is zero."""
    rows = min(len(a), len(b))
    a, b = a[:rows], b[:rows]
    norms = float(a.norm() * b.norm())
    return float((a * b).sum()) / norms if norms else 0.0
