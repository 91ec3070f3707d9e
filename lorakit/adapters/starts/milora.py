"""MiLoRA: start at the minor directions of the base weight (Wang et al. 2024, arXiv:2406.09044, section 3).

    W = U S Vᵀ, of m = min(out, in) singular values:   A = √(S[m-r:] / s) V[:, m-r:]ᵀ,   B = U[:, m-r:] √(S[m-r:] / s)

so that s B A = W_m, the part of W that belongs to its r smallest singular values. Training begins in a subspace
orthogonal to that of W_p = W - W_m, the principal directions, which hold the base model's knowledge. The paper freezes
W_p; here the base keeps its bytes (see the variant `residual`). A 4-bit weight is dequantized and then decomposed.
"""

from __future__ import annotations

import torch

from ...errors import AdapterError
from ...layers import AdaptedLayer
from .matrices import base_matrix, set_factors
from .start import Start


class MiLoRA(Start):
    """A and B from the last r terms of the singular value decomposition of the base weight.

    Raises:
        AdapterError: these singular values are all zero, so A and B would be zero too and get no gradient.
    """

    name = "milora"
    in_base = True
    peft_changes_base = True  # in the authors' version of PEFT; PEFT itself does not have MiLoRA
    decomposes_weight = True

    def set_layer(self, layer: AdaptedLayer, name: str) -> None:
        rank = len(layer.lora_A[name])
        weight = base_matrix(layer, rank)
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        largest_zero = s[0] * max(weight.shape) * torch.finfo(s.dtype).eps  # as in `torch.linalg.matrix_rank`
        if s[-rank] <= largest_zero:
            raise AdapterError(
                f"'milora' at rank {rank} finds no minor directions: a weight of shape {tuple(weight.shape)} has rank "
                f"{int((s > largest_zero).sum())}; choose a higher rank or leave this layer out"
            )
        root = (s[-rank:] / layer.scaling[name]).sqrt()
        set_factors(layer, name, root[:, None] * vh[-rank:], u[:, -rank:] * root)
