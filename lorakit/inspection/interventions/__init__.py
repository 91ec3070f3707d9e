"""Temporary changes to parts of an adapter, and studies that measure their effect."""

from .interventions import ablated, scaled, swapped, truncated, without_directions
from .studies import causal_map, direction_map, held_out_loss, rank_curve, scale_sweep, swap_map

__all__ = [
    "ablated",
    "causal_map",
    "direction_map",
    "held_out_loss",
    "rank_curve",
    "scale_sweep",
    "scaled",
    "swap_map",
    "swapped",
    "truncated",
    "without_directions",
]
