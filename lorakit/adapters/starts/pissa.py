"""PiSSA: start at the principal directions of the base weight (Meng et al. 2024, arXiv:2404.02948, eq. 2 to 4).

    W = U S Vᵀ:   A = √(S[:r] / s) V[:, :r]ᵀ,   B = U[:, :r] √(S[:r] / s)

so that s B A is the best approximation of W of rank r. The base keeps its bytes (see the variant `residual`).
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ...layers import AdaptedLayer
from .matrices import base_matrix, set_factors
from .start import Start


class Pissa(Start):
    """A and B from the singular value decomposition of the base weight."""

    name = "pissa"
    in_base = True
    peft_changes_base = True
    decomposes_weight = True

    def set_layer(self, layer: AdaptedLayer, name: str) -> None:
        rank = len(layer.lora_A[name])
        u, s, vh = self._decomposed(base_matrix(layer, rank), rank)
        root = (s[:rank] / layer.scaling[name]).sqrt()
        set_factors(layer, name, root[:, None] * vh[:rank], u[:, :rank] * root)

    def _decomposed(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return U (out_features, k), S (k,) and Vᵀ (k, in_features) of a weight, k at least the rank."""
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        return u, s, vh


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

    def _decomposed(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        assert self.iterations is not None  # `named` has set it
        u, s, v = torch.svd_lowrank(weight, rank, self.iterations)
        return u, s, v.T
