"""A normal with deviation 1 / r, B zero: the start that diffusion models' adapters are given."""

from __future__ import annotations

import torch

from ...layers import AdaptedLayer


@torch.no_grad()
def gaussian(layer: AdaptedLayer, name: str) -> None:
    """Draw A from N(0, 1 / r²); B stays zero, so that the adapter changes nothing yet."""
    lora_a = layer.lora_A[name]
    lora_a.copy_(torch.empty_like(lora_a, dtype=torch.float32).normal_(std=1 / len(lora_a)))
