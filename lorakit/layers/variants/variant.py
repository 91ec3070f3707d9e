"""What a variant has to say: its parameters beyond A and B, the gain on the adapted weight, the update as a matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..adapted import AdaptedLayer


class KeptGain(NamedTuple):
    """A gain, and the dtype, scaling and values that it was computed for."""

    dtype: torch.dtype
    scaling: float
    gain: Tensor
    sources: tuple[Tensor, ...]


class Variant:
    """How the update of one adapter enters a layer: W becomes gain * (W + update), row by row.

    One object serves all layers; whatever belongs to an adapter is in the layer's tables.

    Attributes:
        name: its key in `VARIANTS`.
        trained: names of the tables of further trained parameters.
        kept: names of the tables of parameters that the adapter needs and nobody trains.
        is_fused: whether A, B, scaling and gain say it all, so that a layer's fused function may compute it.
        has_gain: whether the gain may differ from 1.
    """

    name: str
    trained: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    is_fused: bool = True
    has_gain: bool = False

    def shapes(self, layer: AdaptedLayer) -> dict[str, tuple[int, ...]]:
        """Return the trained tables' shapes: name of the table -> shape of an adapter's parameter."""
        return dict.fromkeys(self.trained, (layer.out_features,))

    def start(self, layer: AdaptedLayer, name: str) -> dict[str, Tensor]:
        """Return the first values of all tables, for the A and B that the layer has by now."""
        return {}

    def gain(self, layer: AdaptedLayer, name: str, dtype: torch.dtype) -> Tensor | None:
        """Return the factor on each row of the adapted weight, (out_features,), or None for 1.

        Args:
            dtype: of the layer's products.
        """
        return None

    def offset(self, layer: AdaptedLayer, name: str) -> Tensor | None:
        """Return what is added to the layer's bias, (out_features,), or None."""
        return None

    def update(self, layer: AdaptedLayer, name: str, x: Tensor) -> Tensor:
        """Return what the low-rank update adds to the layer's output for x, before the gain."""
        return layer.scaling[name] * layer.low_rank(layer.lora_A[name], layer.lora_B[name], x)

    def factors(self, layer: AdaptedLayer, name: str) -> tuple[Tensor, Tensor]:
        """Return the update as (up, down): (out_features, k), with the scaling, and (k, in_features)."""
        lora_a, lora_b = layer.lora_A[name], layer.lora_B[name]
        return layer.scaling[name] * lora_b.flatten(1), lora_a.flatten(1)

    def delta(self, layer: AdaptedLayer, name: str) -> Tensor:
        """Return the change of the base weight, gain * (W + update) - W, as a matrix (out_features, in_features)."""
        up, down = self.factors(layer, name)
        update = up @ down
        gain = self.gain(layer, name, update.dtype)
        if gain is None:
            return update
        weight = layer.as_matrix(layer.base_weight(update.dtype))
        return gain[:, None] * (weight + update) - weight
