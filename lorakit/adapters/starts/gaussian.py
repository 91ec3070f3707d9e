"""A normal with standard deviation 1 / r, B zero: the usual start for adapters of diffusion models."""

from __future__ import annotations

import torch

from ...layers import AdaptedLayer
from .matrices import set_factors
from .start import Start


class Gaussian(Start):
    """A from N(0, 1 / r²); B stays zero, so the adapter changes nothing at first."""

    name = "gaussian"

    def set_layer(self, layer: AdaptedLayer, name: str) -> None:
        lora_a = layer.lora_A[name]
        drawn = torch.empty_like(lora_a, dtype=torch.float32).normal_(std=1 / len(lora_a))
        set_factors(layer, name, drawn, layer.lora_B[name])
