"""Device code of lorakit: tensors in, tensors out, no knowledge of the library above.

`reference` defines every operation in plain PyTorch and runs anywhere; it is the oracle for all other backends.
`cpu` is the same in C++, `triton` in Triton for GPUs. `dispatch` registers the operations with torch.library and picks
the backend.
"""

from . import reference
from .dispatch import (
    BACKENDS,
    dequantize_4bit,
    dequantize_4bit_out,
    dequantize_8bit,
    linear_4bit,
    linear_4bit_dx,
    quantize_4bit,
    quantize_8bit,
    use_backend,
)

__all__ = [
    "BACKENDS",
    "dequantize_4bit",
    "dequantize_4bit_out",
    "dequantize_8bit",
    "linear_4bit",
    "linear_4bit_dx",
    "quantize_4bit",
    "quantize_8bit",
    "reference",
    "use_backend",
]
