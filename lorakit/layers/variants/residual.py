"""Adapters that start inside the base weight (PiSSA, MiLoRA, OLoRA, LoRA-GA), without writing to it.

Their papers take the start out of the base, W_res = W - s B₀ A₀, and train W_res + s B A. The same function, with the
bytes of W as they were:

    W + s B A - s B₀ A₀

which is plain LoRA of rank 2 r, [B, -B₀] and [A; A₀], of which one half is trained; so it is written to files too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .variant import Variant

if TYPE_CHECKING:
    from ..adapted import AdaptedLayer


class Residual(Variant):
    """The update minus the one it started as."""

    name = "residual"
    kept = ("start_A", "start_B")
    is_fused = False

    def start(self, layer: AdaptedLayer, name: str) -> dict[str, Tensor]:
        return {"start_A": layer.lora_A[name].detach().clone(), "start_B": layer.lora_B[name].detach().clone()}

    def update(self, layer: AdaptedLayer, name: str, x: Tensor) -> Tensor:
        return layer.scaling[name] * layer.low_rank(*self._doubled(layer, name), x)

    def factors(self, layer: AdaptedLayer, name: str) -> tuple[Tensor, Tensor]:
        lora_a, lora_b = self._doubled(layer, name)
        return layer.scaling[name] * lora_b.flatten(1), lora_a.flatten(1)

    def _doubled(self, layer: AdaptedLayer, name: str) -> tuple[Tensor, Tensor]:
        lora_a = torch.cat([layer.lora_A[name], layer.table("start_A")[name]], dim=0)
        return lora_a, torch.cat([layer.lora_B[name], -layer.table("start_B")[name]], dim=1)
