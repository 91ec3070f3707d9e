"""A start: B A begins as the first rows of the base weight."""

from __future__ import annotations

import torch

from lorakit.adapters.starts import Start
from lorakit.adapters.starts.matrices import base_matrix, set_factors
from lorakit.layers import AdaptedLayer


class FirstRows(Start):
    """s B A is the first r rows of the base weight: A = W[:r] / s, and the columns of B are the unit vectors."""

    name = "first_rows"
    in_base = True
    peft_changes_base = True
    decomposes_weight = True

    def set_layer(self, layer: AdaptedLayer, name: str) -> None:
        rank = len(layer.lora_A[name])
        weight = base_matrix(layer, rank)
        set_factors(layer, name, weight[:rank] / layer.scaling[name], torch.eye(len(weight), rank))
