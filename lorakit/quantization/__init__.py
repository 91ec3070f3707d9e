"""Four-bit weights: codebooks, the block-wise quantizer, double quantization, bitsandbytes' file format."""

from .codebooks import QUANT_TYPES, Codebook, codebook, dynamic_map
from .quality import QuantizationError
from .scales import NestedScales
from .weight import BLOCK_SIZES, STORAGE_DTYPES, QuantizedWeight, quantize

__all__ = [
    "BLOCK_SIZES",
    "QUANT_TYPES",
    "STORAGE_DTYPES",
    "Codebook",
    "NestedScales",
    "QuantizationError",
    "QuantizedWeight",
    "codebook",
    "dynamic_map",
    "quantize",
]
