"""Device code of lorakit: tensors in, tensors out, no knowledge of the library above.

`reference` defines every operation in plain PyTorch and runs anywhere; it is the oracle for all other backends.
"""

from . import reference

__all__ = ["reference"]
