"""How far two adapters interfere: what adding them would do, from the factors of their updates alone.

An update reads its input along its row space and writes its output along its column space. Two updates that share
neither do not meet. Two updates that share both do, and the cosine between them says whether they do the same there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...adapters.combining.ranks import rank_for_energy
from ...adapters.low_rank import LowRank
from ...errors import AdapterError
from ...printed import Printed

Verdict = Literal["independent", "aligned", "opposed", "entangled"]

LEADING = 0.9  # share of an update's energy that its leading directions hold
SHARED = 0.1  # at most this share of either's energy where the other acts: independent
ALIGNED = 0.5  # cosine from which on up the sum counts the same thing twice
OPPOSED = -0.2  # cosine from which on down the sum cancels

_MEANING = {
    "independent": "they act in different directions: their sum keeps both",
    "aligned": "they partly do the same: weights that sum to 1 keep that from counting twice",
    "opposed": "they partly cancel: unrelated updates would have a larger sum; ties keeps the stronger of each entry",
    "entangled": "they act in the same directions in different ways: measure both tasks after combining them",
}


@dataclass(frozen=True)
class Meeting:
    """Two updates compared: those of one layer, or of all layers that two adapters share.

    Attributes:
        norms: Frobenius norms of the first and the second.
        dot: inner product of the two, the sum of the products of their entries.
        meeting: squared norm of the part of the first that lies where the second acts, and of the second where the
            first acts: |P Δ Q|² with the projections P and Q on the other's leading column and row space.
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
        """Share of the energy of each that lies where the other acts; by chance, about k² / (out · in)."""
        first, second = (part / norm**2 if norm else 0.0 for part, norm in zip(self.meeting, self.norms, strict=True))
        return first, second

    @property
    def verdict(self) -> Verdict:
        """The kind of sum that the two make, by the thresholds of this module.

        aligned     cosine at least ALIGNED
        opposed     cosine at most OPPOSED
        independent at most SHARED of either's energy lies where the other acts
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
            in radians, rising; as many as the lower of `ranks`. 0 is a shared direction, π/2 an unrelated one.
        chance: mean squared cosine of the column and of the row angles between random spaces of these ranks.
    """

    path: str
    ranks: tuple[int, int]
    column_angles: tuple[float, ...]
    row_angles: tuple[float, ...]
    chance: tuple[float, float]


@dataclass(frozen=True, repr=False)
class Interference(Printed, Meeting):
    """Two adapters: the layers that they share, one by one and together as one vector.

    Attributes:
        layers: in the first adapter's order.
        alone: paths that only one of the two adapts: nothing interferes there.
    """

    layers: Sequence[LayerMeeting]
    alone: Sequence[str]

    def __str__(self) -> str:
        verdicts = Counter[str](layer.verdict for layer in self.layers)
        counts = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in _MEANING if verdicts[verdict])
        lines = [
            f"{self.verdict}: {_MEANING[self.verdict]}",
            f"cosine {self.cosine:+.3f}; {self.shared[0]:.1%} of the first's energy and {self.shared[1]:.1%} of the "
            f"second's lie where the other acts; norms {self.norms[0]:.3g} and {self.norms[1]:.3g}",
            f"{len(self.layers)} layers in both: {counts}; {len(self.alone)} in one only",
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
        AdapterError: they share no layer, or a layer's updates differ in shape.
    """
    layers = [layer_meeting(path, first[path], second[path]) for path in first if path in second]
    return together(layers, [path for path in [*first, *second] if (path in first) != (path in second)])


def together(layers: Sequence[LayerMeeting], alone: Sequence[str]) -> Interference:
    """Combine the layers that two adapters share, and the paths that only one adapts, into one result.

    Raises:
        AdapterError: they share no layer.
    """
    if not layers:
        raise AdapterError("the two adapters share no layer, so neither interferes with the other")
    return Interference(
        norms=(math.hypot(*(la.norms[0] for la in layers)), math.hypot(*(la.norms[1] for la in layers))),
        dot=math.fsum(la.dot for la in layers),
        meeting=(math.fsum(la.meeting[0] for la in layers), math.fsum(la.meeting[1] for la in layers)),
        layers=layers,
        alone=alone,
    )


def principal_angles(first: Tensor, second: Tensor) -> tuple[float, ...]:
    """Return the angles between the column spaces of orthonormal (n, j) and (n, k), in radians, rising."""
    cosines = torch.linalg.svdvals(first.T @ second).clamp(max=1)
    return tuple(cosines.arccos().tolist())


def layer_meeting(path: str, first: LowRank, second: LowRank) -> LayerMeeting:
    """Compare the two updates of one layer.

    Raises:
        AdapterError: their shapes differ.
    """
    if first.shape != second.shape:
        raise AdapterError(
            f"{path} has updates of shapes {first.shape} and {second.shape}: probably of different base models"
        )
    pair = [update.to(torch.float64) for update in (first, second)]
    ranks = [rank_for_energy(update.singular_values, LEADING) for update in pair]
    columns = [update.svd[0][:, :rank] for update, rank in zip(pair, ranks, strict=True)]
    rows = [update.svd[2][:rank].T for update, rank in zip(pair, ranks, strict=True)]
    meeting = []
    for this, other in ((0, 1), (1, 0)):
        projected = (columns[other].T @ pair[this].up) @ (pair[this].down @ rows[other])
        meeting.append(float(projected.norm()) ** 2)
    most = max(ranks)
    return LayerMeeting(
        norms=(float(pair[0].norm()), float(pair[1].norm())),
        dot=float(pair[0].dot(pair[1])),
        meeting=(meeting[0], meeting[1]),
        path=path,
        ranks=(ranks[0], ranks[1]),
        column_angles=principal_angles(*columns),
        row_angles=principal_angles(*rows),
        chance=(most / first.shape[0], most / first.shape[1]),
    )
