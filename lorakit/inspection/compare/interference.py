"""How far two adapters are in each other's way: what adding them would do, from the factors of their updates alone.

An update reads its input along its row space and writes its output along its column space. Two updates that share
neither do not meet. Those that share both meet, and then it counts whether they do the same there: the cosine between
them says that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...adapters.combining.ranks import rank_for_energy
from ...adapters.low_rank import LowRank
from ...errors import AdapterError

Verdict = Literal["independent", "aligned", "opposed", "entangled"]

LEADING = 0.9  # of an update's energy lies in its leading directions, as they are meant here
SHARED = 0.1  # less than this share of either's energy where the other acts: independent
ALIGNED = 0.5  # cosine from which the sum counts the same thing twice
OPPOSED = -0.2  # cosine from which on down the sum cancels

_MEANING = {
    "independent": "they act in different directions: their sum keeps both",
    "aligned": "they do the same in part: weights that sum to 1 keep it from counting twice",
    "opposed": "they cancel in part: the sum is weaker than either; ties keeps the stronger of each entry",
    "entangled": "they act in the same directions, each in its own way: measure both tasks after combining them",
}


@dataclass(frozen=True)
class Meeting:
    """Two updates of one shape, or of all layers two adapters share.

    Attributes:
        norms: Frobenius norms of the first and the second.
        dot: inner product of the two, the sum of the products of their entries.
        meeting: squared norm of what the first is where the second acts, and of the second where the first acts:
            |P Δ Q|² with the projections P and Q on the other's leading column and row space.
    """

    norms: tuple[float, float]
    dot: float
    meeting: tuple[float, float]

    @property
    def cosine(self) -> float:
        """Cosine between the updates, as vectors of their entries; 0 where one is zero."""
        product = self.norms[0] * self.norms[1]
        return self.dot / product if product else 0.0

    @property
    def shared(self) -> tuple[float, float]:
        """Share of the energy of each that is where the other acts; by chance, about k² / (out · in)."""
        first, second = (met / norm**2 if norm else 0.0 for met, norm in zip(self.meeting, self.norms, strict=True))
        return first, second

    @property
    def verdict(self) -> Verdict:
        """What the sum of the two will be like, by the thresholds of this module.

        aligned     cosine at least ALIGNED
        opposed     cosine at most OPPOSED
        independent at most SHARED of either's energy is where the other acts
        entangled   none of these
        """
        if self.cosine >= ALIGNED:
            return "aligned"
        if self.cosine <= OPPOSED:
            return "opposed"
        return "independent" if max(self.shared) <= SHARED else "entangled"

    @property
    def meaning(self) -> str:
        """The verdict in a sentence."""
        return _MEANING[self.verdict]


@dataclass(frozen=True)
class LayerMeeting(Meeting):
    """The two updates of one layer.

    Attributes:
        path: of the module.
        ranks: number of leading directions of each, the fewest that hold LEADING of its energy.
        column_angles, row_angles: principal angles (Björck and Golub 1973) between the leading column and row spaces,
            in radians from the smallest; as many as the lower of `ranks`. 0 is a shared direction, π/2 a foreign one.
        chance: mean squared cosine of the column and of the row angles that random spaces of these ranks have.
    """

    path: str
    ranks: tuple[int, int]
    column_angles: tuple[float, ...]
    row_angles: tuple[float, ...]
    chance: tuple[float, float]


@dataclass(frozen=True)
class Interference(Meeting):
    """Two adapters: the layers they share, and these taken together as one vector.

    Attributes:
        layers: in the first adapter's order.
        alone: paths that only one of the two adapts: there nothing is in the way.
    """

    layers: Sequence[LayerMeeting]
    alone: Sequence[str]

    def __str__(self) -> str:
        counts = {verdict: [la for la in self.layers if la.verdict == verdict] for verdict in _MEANING}
        told = ", ".join(f"{len(found)} {verdict}" for verdict, found in counts.items() if found)
        lines = [
            f"{self.verdict}: {_MEANING[self.verdict]}",
            f"cosine {self.cosine:+.3f}; {self.shared[0]:.1%} of the first's energy and {self.shared[1]:.1%} of the "
            f"second's are where the other acts; norms {self.norms[0]:.3g} and {self.norms[1]:.3g}",
            f"{len(self.layers)} layers in both: {told}; {len(self.alone)} in one only",
        ]
        total = self.norms[0] * self.norms[1] or 1.0
        worst = sorted(self.layers, key=lambda layer: -abs(layer.dot))[:5]
        lines += [
            f"  {layer.path}: {layer.verdict}, cosine {layer.cosine:+.3f} ({layer.dot / total:+.3f} of the whole)"
            for layer in worst
        ]
        return "\n".join(lines)


def interference(first: Mapping[str, LowRank], second: Mapping[str, LowRank]) -> Interference:
    """Compare two adapters, module path -> update, layer by layer; in float64 and O((out + in) r²).

    Raises:
        AdapterError: they share no layer, or a layer has two shapes.
    """
    layers = [layer_meeting(path, first[path], second[path]) for path in first if path in second]
    return together(layers, [path for path in [*first, *second] if (path in first) != (path in second)])


def together(layers: Sequence[LayerMeeting], alone: Sequence[str]) -> Interference:
    """Take the layers that two adapters share, and the paths that only one adapts, as a whole.

    Raises:
        AdapterError: they share no layer.
    """
    if not layers:
        raise AdapterError("the two adapters share no layer: nothing of one is in the way of the other")
    return Interference(
        norms=(math.hypot(*(la.norms[0] for la in layers)), math.hypot(*(la.norms[1] for la in layers))),
        dot=math.fsum(la.dot for la in layers),
        meeting=(math.fsum(la.meeting[0] for la in layers), math.fsum(la.meeting[1] for la in layers)),
        layers=layers,
        alone=alone,
    )


def principal_angles(first: Tensor, second: Tensor) -> tuple[float, ...]:
    """Return the angles between the spaces of two matrices with orthonormal columns (n, j) and (n, k), rising."""
    cosines = torch.linalg.svdvals(first.T @ second).clamp(max=1)
    return tuple(cosines.arccos().tolist())


def layer_meeting(path: str, first: LowRank, second: LowRank) -> LayerMeeting:
    """Compare the two updates of one layer.

    Raises:
        AdapterError: their shapes differ.
    """
    if first.shape != second.shape:
        raise AdapterError(f"{path} has updates of shapes {first.shape} and {second.shape}: not of one base model?")
    pair = [update.to(torch.float64) for update in (first, second)]
    ranks = [rank_for_energy(update.singular_values, LEADING) for update in pair]
    columns = [update.svd[0][:, :rank] for update, rank in zip(pair, ranks, strict=True)]
    rows = [update.svd[2][:rank].T for update, rank in zip(pair, ranks, strict=True)]
    met = []
    for this, other in ((0, 1), (1, 0)):
        inner = (columns[other].T @ pair[this].up) @ (pair[this].down @ rows[other])
        met.append(float(inner.norm()) ** 2)
    most = max(ranks)
    return LayerMeeting(
        norms=(float(pair[0].norm()), float(pair[1].norm())),
        dot=float(pair[0].dot(pair[1])),
        meeting=(met[0], met[1]),
        path=path,
        ranks=(ranks[0], ranks[1]),
        column_angles=principal_angles(*columns),
        row_angles=principal_angles(*rows),
        chance=(most / first.shape[0], most / first.shape[1]),
    )
