"""The operations of `ops` in Triton, for GPUs: CUDA, ROCm, XPU.

Quantizing and dequantizing agree with their definitions bit for bit. Only this package imports triton, and it is
imported when its backend is first chosen. Each module of a training operation has its functions, its kernels, and
`sources()`: the same kernels for typical arguments, to compile without a GPU.
"""

from .adamw_8bit import adamw_8bit
from .cross_entropy import cross_entropy
from .dequantize import dequantize_4bit_out, dequantize_8bit
from .dropout import drop
from .linear_4bit import add_linear_4bit_dx, linear_4bit, linear_4bit_dx
from .quantize import quantize_4bit, quantize_8bit
from .rms_norm import rms_norm, rms_norm_backward
from .rope import rope
from .swiglu import swiglu, swiglu_backward

__all__ = [
    "adamw_8bit",
    "add_linear_4bit_dx",
    "cross_entropy",
    "dequantize_4bit_out",
    "dequantize_8bit",
    "drop",
    "linear_4bit",
    "linear_4bit_dx",
    "quantize_4bit",
    "quantize_8bit",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "swiglu",
    "swiglu_backward",
]
