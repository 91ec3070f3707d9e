"""Frozen layers: 4-bit weights, norms, rotary positions, SwiGLU, and the output head with its loss."""
