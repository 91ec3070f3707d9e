"""Measuring one adapter: its updates alone, and against the base weights."""

from .against_base import AgainstBase, compare_with_base
from .info import AdapterInfo
from .inspect import inspect_adapter
from .layer_info import LayerInfo
from .singular_vectors import SingularVectors, singular_vectors

__all__ = [
    "AdapterInfo",
    "AgainstBase",
    "LayerInfo",
    "SingularVectors",
    "compare_with_base",
    "inspect_adapter",
    "singular_vectors",
]
