"""What a merge did to each layer: how large the update was, how much of it survived, what it costs in bytes."""

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
    """One layer's part of a merge.

    Attributes:
        path: of the layer.
        how: what was added to what, in a few words.
        norm: Frobenius norm of the update.
        relative: norm of the update over that of the base weight.
        share: of the update that survived: <real, intended> / <intended, intended>, where `real` is the merged weight
            less what the same way of storing makes of the base alone. 1 where the update is zero.
        max_error: largest |real - intended| of one weight.
        bytes_before, bytes_after: of the layer's weight, without and with what the merge put in; the adapter's own
            matrices are not counted.
        residual_rank: of the low-rank part that is kept beside a 4-bit weight; 0 where there is none.
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
        path: str, how: str, base: Tensor, update: Tensor, real: Tensor, nbytes: tuple[int, int], residual_rank: int = 0
    ) -> LayerMerge:
        """Compare the real change of a weight with the intended one; all of the weight's shape."""
        norm = float(torch.linalg.vector_norm(update, dtype=torch.float64))
        base_norm = float(torch.linalg.vector_norm(base, dtype=torch.float64))
        relative = norm / base_norm if base_norm else (float("inf") if norm else 0.0)
        error = float((real - update).abs().max()) if update.numel() else 0.0
        return LayerMerge(path, how, norm, relative, share_of(real, update), error, *nbytes, residual_rank)


@dataclass
class MergeReport:
    """What `merge_adapter` did; `print(report)` shows a table.

    Attributes:
        names: of the adapters that are merged now, this call's included.
        layers: one entry for each merged layer, in model order.
        base: the 16-bit checkpoint whose weights the update was added to; None: those of the model itself.
        notes: what else there is to know, a sentence each.
    """

    names: tuple[str, ...]
    layers: list[LayerMerge]
    base: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Share of the whole update that survived, over all layers: each counts by the square of its update's norm."""
        total = sum(layer.norm**2 for layer in self.layers)
        return sum(layer.share * layer.norm**2 for layer in self.layers) / total if total else 1.0

    @property
    def warnings(self) -> list[str]:
        """A sentence for each layer of whose update less than 0.95 survived."""
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
        widths = [max(len(row[place]) for row in [heads, *rows]) for place in range(len(heads))]
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
            lines.append(f"the {len(shown)} layers of which least survived (report.table() shows all):")
        return "\n".join([*lines, self.table(shown)])


def share_of(real: Tensor, intended: Tensor) -> float:
    """Return <real, intended> / <intended, intended>, summed in fp64; 1 where nothing was intended."""
    real, intended = real.detach().double().flatten(), intended.detach().double().flatten()
    wanted = float(intended @ intended)
    return float(real @ intended) / wanted if wanted else 1.0
