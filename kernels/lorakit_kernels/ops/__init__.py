"""The operations, one file each: its definition in plain PyTorch, its registration, its gradient.

The definition is the oracle: other backends must match it bit for bit, or to the rounding of a sum or of an exponential
where a module says so. A definition calls other definitions (`x.definition`) and never a backend.
"""
