"""The operations of `reference` in Triton, for GPUs: CUDA, ROCm, XPU. Quantizing and dequantizing agree bit for bit.

Only this package imports triton, and it is imported when its backend is first asked for.
"""

from .dequantize import dequantize_4bit, dequantize_8bit
from .linear import linear_4bit, linear_4bit_dx
from .quantize import quantize_4bit, quantize_8bit

__all__ = ["dequantize_4bit", "dequantize_8bit", "linear_4bit", "linear_4bit_dx", "quantize_4bit", "quantize_8bit"]
