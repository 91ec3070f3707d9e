"""Adapters that start inside the base weight (PiSSA, MiLoRA, OLoRA, LoRA-GA), without writing to it.

Their papers subtract the start from the base, W_res = W - s B₀ A₀, and train W_res + s B A. Written as

    W + s B A - s B₀ A₀

the same function leaves the bytes of W unchanged. This is plain LoRA of rank 2 r, [B, -B₀] and [A; A₀], with one half
trained. Files store it in that form too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .variant import AttachedAdapter, FrozenWeight, Variant


class Residual(Variant):
    """The update minus its initial value."""

    name = "residual"
    kept = ("start_A", "start_B")
    is_fused = False

    title = "LoRA that started inside the base weight"
    is_of_starts = True
    peft_type = "LORA"

    rank_factor = 2
    frozen_copies = 1
    joins_matrices = True

    def start(self, layer: FrozenWeight, adapter: AttachedAdapter) -> dict[str, Tensor]:
        return {"start_A": adapter.lora_A.detach().clone(), "start_B": adapter.lora_B.detach().clone()}

    def update(self, layer: FrozenWeight, adapter: AttachedAdapter, x: Tensor) -> Tensor:
        return adapter.scaling * layer.low_rank(*_doubled(adapter), x)

    def factors(self, adapter: AttachedAdapter) -> tuple[Tensor, Tensor]:
        lora_a, lora_b = _doubled(adapter)
        return adapter.scaling * lora_b.flatten(1), lora_a.flatten(1)

    def to_file(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of plain LoRA with twice the rank and the same scaling."""
        factor = 2**0.5 if values["use_rslora"] else 2
        return values | {
            "r": 2 * values["r"],
            "lora_alpha": factor * values["lora_alpha"],
            "rank_pattern": {key: 2 * rank for key, rank in values["rank_pattern"].items()},
            "alpha_pattern": {key: factor * alpha for key, alpha in values["alpha_pattern"].items()},
        }

    def file_tensors(self, adapter: AttachedAdapter) -> dict[str, Tensor]:
        return {table: matrix.detach() for table, matrix in zip(adapter.matrices, _doubled(adapter), strict=True)}


def _doubled(adapter: AttachedAdapter) -> tuple[Tensor, Tensor]:
    """Return [A; A₀], (2 r, in_features), and [B, -B₀], (out_features, 2 r)."""
    lora_a = torch.cat([adapter.lora_A, adapter.parameters["start_A"]], dim=0)
    return lora_a, torch.cat([adapter.lora_B, -adapter.parameters["start_B"]], dim=1)
