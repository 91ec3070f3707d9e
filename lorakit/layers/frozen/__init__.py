"""Frozen layers: 4-bit weights, norms, rotary positions, and the output head with its loss."""
