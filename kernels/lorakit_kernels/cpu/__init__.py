"""The operations in C++, for tensors on the CPU: codecs, products, the optimizer, and the elementwise operations.

Codecs and optimizer give the results of their definitions, bit for bit. The functions have the definitions' signatures.
They check what C++ cannot see, the dtypes and sizes behind the pointers (`arguments`), and pass the pointers to the
library. `loading` finds the library and `build` compiles it.
"""

from .adamw_8bit import adamw_8bit
from .build import BuildError
from .codec import dequantize_4bit_out, dequantize_8bit, quantize_4bit, quantize_8bit
from .elementwise import cross_entropy, drop, rms_norm, rms_norm_backward, rope, swiglu, swiglu_backward
from .linear_4bit import add_linear_4bit_dx, linear_4bit, linear_4bit_dx
from .loading import instruction_sets, is_available, library, one_thread, threads

__all__ = [
    "BuildError",
    "adamw_8bit",
    "add_linear_4bit_dx",
    "cross_entropy",
    "dequantize_4bit_out",
    "dequantize_8bit",
    "drop",
    "instruction_sets",
    "is_available",
    "library",
    "linear_4bit",
    "linear_4bit_dx",
    "one_thread",
    "quantize_4bit",
    "quantize_8bit",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "swiglu",
    "swiglu_backward",
    "threads",
]
