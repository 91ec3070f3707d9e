"""The report of combining or resizing adapters: ranks and errors, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerChange:
    """One layer of a new adapter, compared with the exact result.

    Attributes:
        path: of the module.
        shape: (out, in) of the update.
        ranks_before: rank of each source; 0 for a source that does not adapt this layer.
        rank: of the new adapter; 0 if the layer is not in it.
        norm: Frobenius norm of the exact update.
        error: Frobenius norm of the exact update minus the new adapter's, divided by `norm`; 0 if `norm` is 0.
    """

    path: str
    shape: tuple[int, int]
    ranks_before: tuple[int, ...]
    rank: int
    norm: float
    error: float

    @property
    def parameters(self) -> int:
        """Number of parameters in the layer's A and B."""
        return self.rank * sum(self.shape)


@dataclass(frozen=True)
class UpdateReport:
    """The result of combining or resizing.

    Attributes:
        title: a short description of the operation.
        layers: in model order.
    """

    title: str
    layers: Sequence[LayerChange]

    @property
    def norm(self) -> float:
        """Frobenius norm of all exact updates together."""
        return math.hypot(*(layer.norm for layer in self.layers))

    @property
    def error(self) -> float:
        """Error of all updates together, relative to `norm`."""
        return math.hypot(*(layer.error * layer.norm for layer in self.layers)) / (self.norm or 1.0)

    @property
    def parameters(self) -> int:
        """Number of parameters in the new adapter's A and B."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def parameters_before(self) -> int:
        """Number of parameters in A and B of all sources together."""
        return sum(sum(layer.ranks_before) * sum(layer.shape) for layer in self.layers)

    @property
    def ranks(self) -> dict[str, int]:
        """Module path -> rank in the new adapter."""
        return {layer.path: layer.rank for layer in self.layers}

    def __str__(self) -> str:
        present = [layer for layer in self.layers if layer.rank]
        ranks = sorted({layer.rank for layer in present})
        spread = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"{ranks[0] if ranks else 0}"
        lines = [
            self.title,
            f"{len(present)} layers, ranks {spread}; {self.parameters:,} parameters, {self.parameters_before:,} before",
            f"relative error of the update: {self.error:.2e}",
        ]
        worst = sorted((layer for layer in self.layers if layer.error), key=lambda layer: -layer.error * layer.norm)
        if worst:
            lines += ["the largest errors are in:"]
            lines += [
                f"  {layer.path}: rank {' + '.join(map(str, layer.ranks_before))} -> {layer.rank}, "
                f"error {layer.error:.2%} of the layer's update"
                for layer in worst[:5]
            ]
        if gone := len(self.layers) - len(present):
            lines.append(f"{gone} layers are not in the new adapter")
        return "\n".join(lines)
