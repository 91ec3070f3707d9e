"""What each LoRA variant costs beside plain LoRA: the one place where the planner asks about a variant.

`groups`, `activations`, `flops` and `peak` turn it into bytes and operations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..layers import Variant

_FP64 = 8  # bytes of an element


@dataclass(frozen=True)
class VariantCost:
    """What the update of a variant takes; the default is plain LoRA.

    Attributes:
        is_fused: whether a linear layer and its update are one function.
        has_gain: whether a gain multiplies each output; with dropout the update then is not part of that function.
        norms: whether the gain comes from the norms of the rows of W + s B A.
        rank_factor: the rank of the products, in ranks of the adapter.
        frozen_copies: of A and B, that are held and not trained.
        joins_matrices: whether A and B are joined with others for each product, and so are new tensors in any dtype.
    """

    is_fused: bool = True
    has_gain: bool = False
    norms: bool = False
    rank_factor: int = 1
    frozen_copies: int = 0
    joins_matrices: bool = False

    def held_bytes(self, out_features: int) -> int:
        """Return the bytes that a layer keeps of its base weight: ||w_i||² of its rows, in fp64."""
        return _FP64 * out_features * self.norms

    def norm_flops(self, rank: int, in_features: int, out_features: int) -> int:
        """Return the FLOPs of the norms of the rows of W + s B A: A Wᵀ, A Aᵀ and B (A Aᵀ)."""
        products = out_features * in_features + rank * in_features + rank * out_features
        return 2 * rank * products * self.norms


_COSTS = {
    "dora": VariantCost(norms=True),
    # [B, -B₀] and [A; A₀]: the update that the adapter started as is taken off again.
    "residual": VariantCost(rank_factor=2, frozen_copies=1, joins_matrices=True),
}


def variant_cost(variant: Variant) -> VariantCost:
    """Return the cost of a variant of `lorakit.layers.VARIANTS`."""
    cost = _COSTS.get(variant.name, VariantCost())
    return replace(cost, is_fused=variant.is_fused, has_gain=variant.has_gain)
