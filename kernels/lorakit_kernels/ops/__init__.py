"""The operations, one file each: definition in plain PyTorch, registration, gradient.

The definition is the oracle. Other backends match it bit for bit, or to the rounding of a sum or an exponential where
a module says so. A definition calls other definitions (`x.definition`) and never a backend.
"""
