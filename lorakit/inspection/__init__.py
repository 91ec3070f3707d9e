"""Inspection: what is inside an adapter, in figures, a table, sentences and a page; while it trains, too."""

from .against_base import AgainstBase, compare_with_base
from .info import AdapterInfo
from .inspect import inspect_adapter
from .layers import LayerInfo
from .similarity import Comparison, LayerSimilarity, compare_updates, subspace_similarity
from .singular_vectors import SingularVectors, singular_vectors

__all__ = [
    "AdapterInfo",
    "AgainstBase",
    "Comparison",
    "LayerInfo",
    "LayerSimilarity",
    "SingularVectors",
    "compare_updates",
    "compare_with_base",
    "inspect_adapter",
    "singular_vectors",
    "subspace_similarity",
]
