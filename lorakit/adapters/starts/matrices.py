"""Helpers of the starts: the base weight as an fp32 matrix, and setting an adapter's A and B."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import AdapterError
from ...layers import AdaptedLayer


def base_matrix(layer: AdaptedLayer, rank: int) -> Tensor:
    """Return the base weight as (out_features, in_features) fp32.

    Raises:
        AdapterError: it is not a single matrix, or has fewer than `rank` rows or columns.
    """
    matrix = layer.as_matrix(layer.base_weight(torch.float32))
    if matrix.ndim != 2 or rank > min(matrix.shape):
        raise AdapterError(f"a start of rank {rank} cannot be taken from a weight of shape {tuple(matrix.shape)}")
    return matrix


@torch.no_grad()
def set_factors(layer: AdaptedLayer, name: str, lora_a: Tensor, lora_b: Tensor) -> None:
    """Set A from (r, in_features) and B from (out_features, r), and restart the variant's own parameters from them.

    Both take the shape and the dtype that the layer has for them.
    """
    for parameter, values in ((layer.lora_A[name], lora_a), (layer.lora_B[name], lora_b)):
        parameter.copy_(values.reshape(parameter.shape))
    layer.restart(name)
