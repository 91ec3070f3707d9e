"""Comparing updates: two adapters with each other, the effect of adding them, and the ranks that one needs."""

from .advice import RankAdvice, advise_ranks
from .interference import Interference, interference
from .similarity import Comparison, LayerSimilarity, compare_updates, subspace_similarity

__all__ = [
    "Comparison",
    "Interference",
    "LayerSimilarity",
    "RankAdvice",
    "advise_ranks",
    "compare_updates",
    "interference",
    "subspace_similarity",
]
