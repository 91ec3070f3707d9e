"""PiSSA: start at the principal directions of the base weight (Meng et al. 2024, arXiv:2404.02948, eq. 2 to 4).

    W = U S Vᵀ:   A = √(S[:r] / s) V[:, :r]ᵀ,   B = U[:, :r] √(S[:r] / s)

so that s B A is the best approximation of W of rank r. The base keeps its bytes; see the variant `residual`.
"""

from __future__ import annotations

import torch

from ...layers import AdaptedLayer
from .matrices import base_matrix, write


@torch.no_grad()
def pissa(layer: AdaptedLayer, name: str, iterations: int | None = None) -> None:
    """Set A and B from the singular value decomposition of the base weight.

    Args:
        iterations: of the randomized decomposition (Halko et al., arXiv:0909.4061), which takes a fraction of the
            time; None: the exact one.
    """
    rank = len(layer.lora_A[name])
    weight = base_matrix(layer, rank)
    if iterations is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    else:
        u, s, v = torch.svd_lowrank(weight, rank, iterations)
        vh = v.T
    root = (s / layer.scaling[name]).sqrt()
    write(layer, name, root[:, None] * vh, u * root)
