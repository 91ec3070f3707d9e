"""One adapted layer's update, measured from its two factors: spectrum, norms, used ranks and dead parts.

The update is never formed: everything comes from QR decompositions of the factors, in O((out + in) r²), in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...adapters.combining.ranks import rank_for_energy
from ...printed import Printed
from .against_base import AgainstBase
from .module_paths import ModulePath
from .spectrum import effective_rank, energy, noise_rank, numerical_rank, stable_rank
from .updates import LayerUpdate


@dataclass(frozen=True, repr=False)
class LayerInfo(Printed):
    """The figures of one layer's update Δ = scaling·B·A. DoRA's magnitude is not in Δ; see `base`.

    Attributes:
        name: module path; for one expert among several, with [number] after it.
        stack, index, module: the path taken apart, see `ModulePath`.
        kind: linear, embedding, conv or experts.
        rank: the allotted rank r.
        shape: (out, in) of the update; embedding (dim, vocab), convolution (out, in·kernel).
        parameters: number of parameters of A and B.
        scaling: the factor on B·A.
        singular_values: of Δ, in falling order, min(r, out, in) of them.
        noise_rank: number of singular values that stand out from noise, see `spectrum.noise_rank`.
        norm_a, norm_b: Frobenius norms of the stored A and B.
        dead_outputs, dead_inputs: rows and columns of Δ that are exactly zero, though Δ is not.
        dead_directions: number of the r products of a column of B and a row of A that are exactly zero.
        base: Δ against the base weight, where one was given.
    """

    name: str
    stack: str
    index: int | None
    module: str
    kind: str
    rank: int
    shape: tuple[int, int]
    parameters: int
    scaling: float
    singular_values: tuple[float, ...]
    noise_rank: int
    norm_a: float
    norm_b: float
    dead_outputs: int
    dead_inputs: int
    dead_directions: int
    base: AgainstBase | None = None

    def __str__(self) -> str:
        based = "" if self.base is None else f", {self.base.relative_norm:.2%} of its base weight's"
        return (
            f"{self.name} {self.shape}: rank {self.rank}, norm {self.norm:.4g}{based}, effective rank "
            f"{self.effective_rank:.1f}, rank for 99% {self.rank_for(0.99)}, largest singular value "
            f"{self.spectral_norm:.3g}"
        )

    @cached_property
    def spectrum(self) -> Tensor:
        """The singular values as a float64 tensor (k,), which the functions of `spectrum` take."""
        return torch.tensor(self.singular_values, dtype=torch.float64)

    @cached_property
    def norm(self) -> float:
        """‖Δ‖F, the Frobenius norm."""
        return float(self.spectrum.norm())

    @property
    def spectral_norm(self) -> float:
        """‖Δ‖₂, the largest singular value."""
        return max(self.singular_values, default=0.0)

    @property
    def nuclear_norm(self) -> float:
        """‖Δ‖*, the sum of the singular values."""
        return float(self.spectrum.sum())

    @property
    def effective_rank(self) -> float:
        """The exponential of the singular values' entropy; see `spectrum.effective_rank`."""
        return effective_rank(self.spectrum)

    @property
    def stable_rank(self) -> float:
        """‖Δ‖F² / ‖Δ‖₂²."""
        return stable_rank(self.spectrum)

    @property
    def numerical_rank(self) -> int:
        """Number of singular values above single precision's rounding."""
        return numerical_rank(self.spectrum)

    @property
    def dead(self) -> bool:
        """Whether Δ is exactly zero, as at the start of training, where B = 0."""
        return self.spectral_norm == 0

    @property
    def sparsity(self) -> float:
        """Share of Δ's entries in rows or columns that are exactly zero; 1 for a dead layer."""
        if self.dead:
            return 1.0
        out, into = self.shape
        return 1 - (1 - self.dead_outputs / out) * (1 - self.dead_inputs / into)

    def energy(self, k: int) -> float:
        """Return the share of ‖Δ‖F² that the best update of rank k keeps."""
        return energy(self.spectrum, k)

    def rank_for(self, share: float) -> int:
        """Return the smallest rank that keeps this share of ‖Δ‖F²."""
        return rank_for_energy(self.spectrum, share)

    def row(self) -> dict[str, Any]:
        """Return the layer as one flat row of a table: plain numbers and words."""
        names = [
            "name", "stack", "index", "module", "kind", "rank", "parameters", "scaling", "norm", "spectral_norm",
            "nuclear_norm", "effective_rank", "stable_rank", "numerical_rank", "noise_rank", "norm_a", "norm_b",
            "dead", "dead_outputs", "dead_inputs", "dead_directions", "sparsity",
        ]  # fmt: skip
        row = {name: getattr(self, name) for name in names}
        row |= {"out_features": self.shape[0], "in_features": self.shape[1]}
        row |= {f"rank_for_{percent}": self.rank_for(percent / 100) for percent in (90, 95, 99)}
        return row | (self.base.row() if self.base else {})


def measure_update(update: LayerUpdate, module_path: ModulePath, base: AgainstBase | None = None) -> LayerInfo:
    """Measure one update from its factors."""
    up, down = update.low_rank.up, update.low_rank.down
    columns = [triangle.square().sum(0) for triangle in update.low_rank.triangles]  # r squared norms each
    alive = (columns[0] > 0) & (columns[1] > 0)
    is_dead = not alive.any()
    if not alive.all():
        up, down = up[:, alive], down[alive]
    s = update.low_rank.singular_values
    return LayerInfo(
        name=update.name,
        stack=module_path.stack,
        index=module_path.index,
        module=module_path.module,
        kind=update.kind,
        rank=update.rank,
        shape=update.low_rank.shape,
        parameters=update.parameters,
        scaling=update.scaling,
        singular_values=(0.0,) * s.numel() if is_dead else tuple(s.tolist()),
        noise_rank=0 if is_dead else noise_rank(s, update.low_rank.shape[0]),
        norm_a=float(columns[1].sum().sqrt()),
        norm_b=float(columns[0].sum().sqrt()) / update.scaling,
        dead_outputs=0 if is_dead else _zero_rows(up),
        dead_inputs=0 if is_dead else _zero_rows(down.T),
        dead_directions=int((~alive).sum()),
        base=base,
    )


def _zero_rows(matrix: Tensor) -> int:
    """Return the number of rows that are exactly zero; only rows that one product leaves zero are examined."""
    probe = torch.linspace(1, 2, matrix.shape[1], dtype=matrix.dtype)
    candidates = (matrix @ probe == 0).nonzero().flatten()
    return int((matrix[candidates] == 0).all(1).sum())
