"""LoRA whose B has a bias, for updates that were extracted from a full fine-tune: W + s B A, b + s b_B.

The bias is scaled like the rest of the update; at the start it is zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .variant import Variant

if TYPE_CHECKING:
    from ..adapted import AdaptedLayer


class LoRABias(Variant):
    """One more trained vector, which `scaling` multiplies as it does B @ A."""

    name = "lora_bias"
    trained = ("lora_bias",)
    is_fused = False

    def start(self, layer: AdaptedLayer, name: str) -> dict[str, Tensor]:
        lora_b = layer.lora_B[name]
        return {"lora_bias": torch.zeros(layer.out_features, dtype=lora_b.dtype, device=lora_b.device)}

    def offset(self, layer: AdaptedLayer, name: str) -> Tensor:
        bias: Tensor = layer.table("lora_bias")[name]
        return layer.scaling[name] * bias
