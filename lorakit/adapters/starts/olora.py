"""OLoRA: start at an orthonormal basis of the base weight (Büyükakyüz 2024, arXiv:2406.01775, eq. 2 and 3).

    W = Q R:   A = R[:r],   B = Q[:, :r]

The base keeps its bytes (see the variant `residual`).
"""

from __future__ import annotations

import torch

from ...layers import AdaptedLayer
from .matrices import base_matrix, set_factors
from .start import Start


class OLoRA(Start):
    """A and B from the QR decomposition of the base weight."""

    name = "olora"
    in_base = True
    peft_changes_base = True
    decomposes_weight = True

    def set_layer(self, layer: AdaptedLayer, name: str) -> None:
        rank = len(layer.lora_A[name])
        q, r = torch.linalg.qr(base_matrix(layer, rank))
        set_factors(layer, name, r[:rank], q[:, :rank])
