"""PiSSA: start at the principal directions of the base weight (Meng et al. 2024, arXiv:2404.02948, eq. 2 to 4).

    W = U S Vᵀ:   A = √(S[:r] / s) V[:, :r]ᵀ,   B = U[:, :r] √(S[:r] / s)

so that s B A is the best approximation of W of rank r. The base keeps its bytes (see the variant `residual`).
"""

from __future__ import annotations

import re

import torch

from ...layers import AdaptedLayer
from .matrices import base_matrix, set_product
from .start import Start


class Pissa(Start):
    """A and B from the singular value decomposition of the base weight."""

    name = "pissa"
    in_base = True
    peft_changes_base = True
    decomposes_weight = True

    def set_layer(self, layer: AdaptedLayer, name: str) -> None:
        rank = len(layer.lora_A[name])
        u, s, vh = torch.linalg.svd(base_matrix(layer, rank), full_matrices=False)
        set_product(layer, name, u[:, :rank], s[:rank], vh[:rank])


class RandomizedPissa(Pissa):
    """PiSSA with a randomized decomposition (Halko et al., arXiv:0909.4061), which takes a fraction of the time.

    Args:
        iterations: power iterations of the decomposition; None for the entry of the table, which stands for any number.
    """

    name = "pissa_niter_N"

    def __init__(self, iterations: int | None = None) -> None:
        if iterations is not None:
            self.name = f"pissa_niter_{iterations}"
        self.iterations = iterations

    def named(self, value: bool | str) -> Start | None:
        match = re.fullmatch(r"pissa_niter_([1-9]\d*)", str(value))
        return RandomizedPissa(int(match[1])) if match else None

    def set_layer(self, layer: AdaptedLayer, name: str) -> None:
        assert self.iterations is not None  # `named` has set it
        rank = len(layer.lora_A[name])
        u, s, v = torch.svd_lowrank(base_matrix(layer, rank), rank, self.iterations)
        set_product(layer, name, u, s, v.T)
