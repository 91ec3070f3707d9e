"""LoftQ: start at what quantization lost of the weight (Li et al. 2023, arXiv:2310.08659, algorithm 1, one step).

    min || W - Q(W) - s B A ||_F:   U S Vᵀ = svd(W - Q(W)),   A = √(S[:r] / s) V[:, :r]ᵀ,   B = U[:, :r] √(S[:r] / s)

W is the weight that was quantized, which a 4-bit layer no longer holds: the caller gives it. The factors are divided by
the scaling, so that the adapter as it enters forward, s B A, is the approximation, whatever alpha and rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import AdapterError
from ...layers import AdaptedLayer
from .matrices import base_matrix, write


@torch.no_grad()
def loftq(layer: AdaptedLayer, name: str, source: Tensor) -> None:
    """Set A and B to the best approximation, of their rank, of what the base layer lost.

    Args:
        source: the weight before it was quantized, in the layer's shape.

    Raises:
        AdapterError: it does not fit the layer.
    """
    rank = len(layer.lora_A[name])
    quantized = base_matrix(layer, rank)
    source = layer.as_matrix(source.to(quantized.device, torch.float32))
    if source.shape != quantized.shape:
        raise AdapterError(f"a weight of shape {tuple(source.shape)} is no source of {tuple(quantized.shape)}")
    u, s, vh = torch.linalg.svd(source - quantized, full_matrices=False)
    root = (s[:rank] / layer.scaling[name]).sqrt()
    write(layer, name, root[:, None] * vh[:rank], u[:, :rank] * root)
