"""The operations of `reference_training` in Triton, for GPUs: CUDA, ROCm, XPU.

Only this package imports triton, and it is imported when its backend is first asked for. A module has the functions of
one operation, its kernels, and `sources()`: the same kernels for typical arguments, to compile where there is no GPU.
"""

from .adamw import adamw_8bit
from .cross_entropy import cross_entropy
from .rms_norm import rms_norm, rms_norm_backward
from .rope import rope
from .swiglu import swiglu, swiglu_backward

__all__ = [
    "adamw_8bit",
    "cross_entropy",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "swiglu",
    "swiglu_backward",
]
