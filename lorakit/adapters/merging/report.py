"""The report of a merge: for each layer the size of the update, the share that survived and the cost in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...sizes import format_size

LEAST_SHARE = 0.95  # of an update that should survive a merge
_SHOWN = 20  # layers in a printed report


@dataclass(frozen=True)
class LayerMerge:
    """The report's line for one layer.

    Attributes:
        path: of the layer.
        how: the method in a few words.
        norm: Frobenius norm of the update.
        relative: norm of the update divided by that of the base weight.
        share: share of the update that survived, <real, intended> / <intended, intended>. `real` is the merged weight
            minus the base alone stored in the same way. 1 if the update is zero.
        max_error: largest |real - intended| of one weight.
        bytes_before, bytes_after: of the layer's weight before and after the merge, without the adapter's own matrices.
        residual_rank: of the low-rank part beside a 4-bit weight; 0 if there is none.
    """

    path: str
    how: str
    norm: float
    relative: float
    share: float
    max_error: float
    bytes_before: int
    bytes_after: int
    residual_rank: int = 0

    @staticmethod
    def measure(
        path: str,
        how: str,
        base: Tensor,
        update: Tensor,
        real: Tensor,
        *,
        nbytes: tuple[int, int],
        residual_rank: int = 0,
    ) -> LayerMerge:
        """Compare the real change of a weight with the intended one, the update; all tensors have the weight's shape.

        Args:
            nbytes: of the weight, before and after.
        """
        norm = float(torch.linalg.vector_norm(update, dtype=torch.float64))
        base_norm = float(torch.linalg.vector_norm(base, dtype=torch.float64))
        relative = norm / base_norm if base_norm else (float("inf") if norm else 0.0)
        error = float((real - update).abs().max()) if update.numel() else 0.0
        return LayerMerge(path, how, norm, relative, share_of(real, update), error, *nbytes, residual_rank)


@dataclass
class MergeReport:
    """What `merge_adapter` did; `print(report)` shows a table.

    Attributes:
        names: of all adapters that are merged now, not only this call's.
        layers: one entry for each merged layer, in model order.
        base: the 16-bit checkpoint to whose weights the update was added; None for the model's own weights.
        notes: further remarks, one sentence each.
    """

    names: tuple[str, ...]
    layers: list[LayerMerge]
    base: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Share of the update that survived in all layers together, weighted by the squared norms of their updates."""
        total = sum(layer.norm**2 for layer in self.layers)
        return sum(layer.share * layer.norm**2 for layer in self.layers) / total if total else 1.0

    @property
    def warnings(self) -> list[str]:
        """One sentence for each layer in which less than 0.95 of the update survived."""
        return [
            f"{layer.path}: only {layer.share:.3f} of the update survived"
            for layer in self.layers
            if layer.share < LEAST_SHARE
        ]

    @property
    def bytes_before(self) -> int:
        """Bytes of the layers' weights before."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of the layers' weights after, residual parts included."""
        return sum(layer.bytes_after for layer in self.layers)

    def table(self, layers: Sequence[LayerMerge] | None = None) -> str:
        """Return a table of some layers, by default of all."""
        heads = ("layer", "how", "‖update‖", "of ‖W‖", "survived", "max error", "bytes before", "after")
        rows = [
            (
                layer.path, layer.how, f"{layer.norm:.4g}", f"{layer.relative:.2%}", f"{layer.share:.4f}",
                f"{layer.max_error:.2g}", f"{layer.bytes_before:,}", f"{layer.bytes_after:,}",
            )
            for layer in (self.layers if layers is None else layers)
        ]  # fmt: skip
        widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
        return "\n".join(
            "  ".join(
                f"{row[i]:<{width}}" if i < 2 else f"{row[i]:>{width}}" for i, width in enumerate(widths)
            ).rstrip()
            for row in [heads, *rows]
        )

    def __str__(self) -> str:
        names = ", ".join(f"'{name}'" for name in self.names)
        source = "the model's own weights" if self.base is None else str(self.base)
        lines = [
            f"merged {names} into {len(self.layers)} layers, onto {source}: {self.share:.4f} of the update survived; "
            f"weights {format_size(self.bytes_before)} -> {format_size(self.bytes_after)}"
        ]
        lines += [f"note: {note}" for note in self.notes] + [f"warning: {warning}" for warning in self.warnings]
        worst = sorted(self.layers, key=lambda layer: layer.share)[:_SHOWN]
        shown = [layer for layer in self.layers if layer in worst]
        if len(shown) < len(self.layers):
            lines.append(f"the {len(shown)} layers in which least survived (report.table() shows all):")
        return "\n".join([*lines, self.table(shown)])


def share_of(real: Tensor, intended: Tensor) -> float:
    """Return <real, intended> / <intended, intended> of two tensors of one shape, in fp64; 1 if `intended` is zero."""
    real, intended = real.detach().double().flatten(), intended.detach().double().flatten()
    wanted = float(intended @ intended)
    return float(real @ intended) / wanted if wanted else 1.0
