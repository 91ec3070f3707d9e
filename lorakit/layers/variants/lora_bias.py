"""LoRA with a bias on B, for updates that were extracted from a full fine-tune: W + s B A, b + s b_B.

The bias starts at zero and is scaled like the rest of the update.
"""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor

from .variant import PLAIN_ENDINGS, AttachedAdapter, FrozenWeight, Variant


class LoRABias(Variant):
    """A further trained vector (out_features,), which `scaling` multiplies like B @ A."""

    name = "lora_bias"
    trained = ("lora_bias",)
    is_fused = False
    has_offset = True

    title = "LoRA with a bias on B"
    meaning = "a bias on B"
    not_low_rank = "has a trained bias (lora_bias), which is not a low-rank update"
    further = "a bias on lora_B"
    may_lack_further = True
    switch = "lora_bias"
    peft_type = "LORA"
    endings = MappingProxyType({**PLAIN_ENDINGS, "lora_bias": "lora_B.bias"})

    def problem(self, layer: FrozenWeight) -> str | None:
        return None if layer.has_bias else "which has no bias for lora_bias to change"

    def start(self, layer: FrozenWeight, adapter: AttachedAdapter) -> dict[str, Tensor]:
        lora_b = adapter.lora_B
        return {"lora_bias": torch.zeros(layer.out_features, dtype=lora_b.dtype, device=lora_b.device)}

    def offset(self, adapter: AttachedAdapter) -> Tensor | None:
        bias = adapter.parameters.get("lora_bias")
        return None if bias is None else adapter.scaling * bias
