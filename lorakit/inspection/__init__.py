"""Inspection: figures, tables, sentences and a page about what is inside an adapter, also while it trains."""

from .compare.similarity import Comparison, LayerSimilarity, compare_updates, subspace_similarity
from .measure.against_base import AgainstBase, compare_with_base
from .measure.info import AdapterInfo
from .measure.inspect import inspect_adapter
from .measure.layer_info import LayerInfo
from .measure.singular_vectors import SingularVectors, singular_vectors

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
