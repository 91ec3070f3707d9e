"""A variant: each row of the update has a trained weight."""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.layers import AttachedAdapter, FrozenWeight, Variant


class Weighted(Variant):
    """W + s diag(1 + c) B A with one more trained vector c, zero at the start."""

    name = "weighted"
    title = "weighted LoRA"
    meaning = "an update whose rows have weights"
    trained = ("row_weights",)
    is_fused = False

    def start(self, layer: FrozenWeight, adapter: AttachedAdapter) -> dict[str, Tensor]:
        return {"row_weights": torch.zeros(layer.out_features, dtype=adapter.lora_A.dtype)}

    def update(self, layer: FrozenWeight, adapter: AttachedAdapter, x: Tensor) -> Tensor:
        return adapter.scaling * layer.low_rank(adapter.lora_A, self.weighted(adapter), x)

    def factors(self, adapter: AttachedAdapter) -> tuple[Tensor, Tensor]:
        return adapter.scaling * self.weighted(adapter), adapter.lora_A

    def weighted(self, adapter: AttachedAdapter) -> Tensor:
        return (1 + adapter.parameters["row_weights"][:, None]) * adapter.lora_B
