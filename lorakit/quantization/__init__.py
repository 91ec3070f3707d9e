"""Four-bit weights: codebooks, the block-wise quantizer, double quantization."""

from .blockwise import BLOCK_SIZES, NestedScales, QuantizedWeight, quantize
from .codebooks import QUANT_TYPES, Codebook, codebook, dynamic_map

__all__ = [
    "BLOCK_SIZES",
    "QUANT_TYPES",
    "Codebook",
    "NestedScales",
    "QuantizedWeight",
    "codebook",
    "dynamic_map",
    "quantize",
]
