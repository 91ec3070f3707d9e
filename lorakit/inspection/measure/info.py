"""`AdapterInfo`: everything measured about one adapter, as plain frozen values, a tidy table and a few sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from ...printed import Printed, as_text
from ..compare.similarity import Comparison
from ..tables import Tidy
from .layer_info import LayerInfo

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, repr=False)
class AdapterInfo(Printed, Tidy):
    """One adapter, measured.

    Attributes:
        source: where it is from.
        layers: every update, in model order as far as paths tell it.
        base: the base that it was measured against, or None.
        extras: tensors of the folder that are not updates (modules saved whole, trained biases): named, not measured.
        changed_base: the start ("pissa", ...) that moved part of the base into the adapter, or None. The figures are of
            B·A as the file has it, which is then not the whole change of the base.
        other: the adapter that it was compared with, measured in the same way.
        comparison: the two, layer by layer.
        findings: what stands out, in sentences, the most important first.
    """

    source: str
    layers: tuple[LayerInfo, ...]
    base: str | None = None
    extras: tuple[str, ...] = ()
    changed_base: str | None = None
    other: AdapterInfo | None = None
    comparison: Comparison | None = None
    findings: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return as_text(self.print_to)

    def __repr__(self) -> str:
        return f"<AdapterInfo: {self.source}, {self.summary}; print it, or see its layers, findings and table()>"

    def print_to(self, console: Console, more: Sequence[str] = ()) -> None:
        """Print the findings, a line of figures for each kind of module, and a map of the update's norms.

        Args:
            more: further findings to print with these.
        """
        from rich.table import Table
        from rich.text import Text

        from .printed import modules_table, norms_map

        console.print(self.source, style="bold", markup=False, soft_wrap=True)
        console.print(f"{self.summary}\n", markup=False)
        bullets = Table.grid(padding=(0, 1, 0, 0))
        for finding in [*self.findings, *more]:
            bullets.add_row("•", Text(finding))
        console.print(bullets)
        console.print()
        console.print(modules_table(self.layers))
        if any(layer.index is not None for layer in self.layers):
            console.print()
            console.print(norms_map(self.layers))

    @property
    def summary(self) -> str:
        """The size of the adapter and of its update, and the base, in a few words."""
        on = f", on {self.base}" if self.base else ""
        return f"{len(self.layers)} layers, {self.parameters:,} parameters, norm {self.norm:.4g}{on}"

    @cached_property
    def norm(self) -> float:
        """Frobenius norm of all updates together."""
        return float(sum(layer.norm**2 for layer in self.layers) ** 0.5)

    @property
    def parameters(self) -> int:
        """Parameters of all A and B."""
        return sum(layer.parameters for layer in self.layers)

    def energy(self, k: int) -> float:
        """Return the share of the update's squared norm over all layers that rank k in every layer would keep."""
        total = self._kept[-1]
        return self._kept[min(k, len(self._kept) - 1)] / total if total else 1.0

    @cached_property
    def _kept(self) -> list[float]:
        """Squared norm that rank 0, 1, 2, ... would keep."""
        largest = max(len(layer.singular_values) for layer in self.layers)
        squares = torch.zeros(largest + 1, dtype=torch.float64)
        for layer in self.layers:
            squares[1 : len(layer.singular_values) + 1] += layer.spectrum.square()
        kept: list[float] = squares.cumsum(0).tolist()
        return kept

    def share(self, layer: LayerInfo) -> float:
        """Return a layer's share of the squared Frobenius norm of all updates."""
        return (layer.norm / self.norm) ** 2 if self.norm else 0.0

    def table(self) -> list[dict[str, Any]]:
        """Return one flat row of numbers and words per layer, with columns of the base and the comparison if known."""
        compared = {layer.name: layer for layer in self.comparison.layers} if self.comparison else {}
        rows = []
        for layer in self.layers:
            row = layer.row() | {"share": self.share(layer)}
            if layer.name in compared:
                row |= {f"vs_{key}": value for key, value in compared[layer.name].row().items() if key != "name"}
            rows.append(row)
        columns = dict.fromkeys(column for row in rows for column in row)
        return [{column: row.get(column) for column in columns} for row in rows]

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values: the table, each layer's spectra, the comparison and the findings."""
        layers = [
            row
            | {"singular_values": list(layer.singular_values)}
            | ({"base": asdict(layer.base)} if layer.base else {})
            for row, layer in zip(self.table(), self.layers, strict=True)
        ]
        return {
            "source": self.source,
            "base": self.base,
            "norm": self.norm,
            "parameters": self.parameters,
            "extras": list(self.extras),
            "findings": list(self.findings),
            "layers": layers,
            "comparison": None if self.comparison is None else _comparison_json(self.comparison),
            "other": None if self.other is None else self.other.as_json(),
        }


def _comparison_json(comparison: Comparison) -> dict[str, Any]:
    whole = comparison.interference
    angles = ("row_angles", "column_angles")
    return {
        "source": comparison.source,
        "cosine": whole.cosine,
        "verdict": whole.verdict,
        "only_here": list(comparison.only_here),
        "only_there": list(comparison.only_there),
        "layers": [
            layer.row() | {"change": list(layer.change)} | {name: list(getattr(layer.meeting, name)) for name in angles}
            for layer in comparison.layers
        ],
    }
