"""LoftQ: start at the quantization error of the weight (Li et al. 2023, arXiv:2310.08659, algorithm 1, one step).

    min || W - Q(W) - s B A ||_F:   U S Vᵀ = svd(W - Q(W)),   A = √(S[:r] / s) V[:, :r]ᵀ,   B = U[:, :r] √(S[:r] / s)

The caller gives W, the weight before quantization, since a 4-bit layer no longer holds it. Dividing by the scaling
makes s B A, the update in forward, the approximation, whatever alpha and rank are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...errors import AdapterError
from ...layers import AdaptedLayer
from .matrices import base_matrix, set_factors
from .start import Start, StartData


class LoftQ(Start):
    """A and B from the best approximation of rank r of the base layer's quantization error."""

    name = "loftq"
    needs = "sources"
    peft_changes_base = True
    repairs_quantization = True
    decomposes_weight = True

    @torch.no_grad()
    def run(self, layers: Mapping[str, AdaptedLayer], name: str, data: StartData) -> None:
        """Set A and B from the weights before quantization.

        Raises:
            AdapterError: the sources lack a layer's weight, or it does not fit the layer.
        """
        for path, layer in layers.items():
            if f"{path}.weight" not in data.sources:
                raise AdapterError(f"`sources` has no '{path}.weight', the weight before quantization")
            rank = len(layer.lora_A[name])
            quantized = base_matrix(layer, rank)
            source = layer.as_matrix(data.sources[f"{path}.weight"].to(quantized.device, torch.float32))
            if source.shape != quantized.shape:
                raise AdapterError(f"a weight of shape {tuple(source.shape)} is no source of {tuple(quantized.shape)}")
            u, s, vh = torch.linalg.svd(source - quantized, full_matrices=False)
            root = (s[:rank] / layer.scaling[name]).sqrt()
            set_factors(layer, name, root[:, None] * vh[:rank], u[:, :rank] * root)
