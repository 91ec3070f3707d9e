"""What the starts share: the base weight as a matrix in fp32, and setting an adapter's A and B."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import AdapterError
from ...layers import AdaptedLayer


def base_matrix(layer: AdaptedLayer, rank: int) -> Tensor:
    """Return the base weight as (out_features, in_features) fp32.

    Raises:
        AdapterError: it is not one matrix, or it has fewer than `rank` directions to start from.
    """
    matrix = layer.as_matrix(layer.base_weight(torch.float32))
    if matrix.ndim != 2 or rank > min(matrix.shape):
        raise AdapterError(f"a start of rank {rank} cannot be taken from a weight of shape {tuple(matrix.shape)}")
    return matrix


@torch.no_grad()
def set_factors(layer: AdaptedLayer, name: str, lora_a: Tensor, lora_b: Tensor) -> None:
    """Set A from (r, in_features) and B from (out_features, r), and restart the variant's own parameters from them.

    They are reshaped and cast as the layer keeps its A and B.
    """
    own_a, own_b = layer.lora_A[name], layer.lora_B[name]
    own_a.copy_(lora_a.reshape(own_a.shape))
    own_b.copy_(lora_b.reshape(own_b.shape))
    layer.restart(name)
