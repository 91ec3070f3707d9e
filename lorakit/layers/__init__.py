"""Layers with hand-written forward and backward passes."""

from .adapted import AdaptedLayer, AdapterPart
from .embedding4bit import Embedding4bit
from .linear4bit import Linear4bit
from .linear_cross_entropy import linear_cross_entropy, token_losses
from .lora_linear import Again, LoRALinear, linear_together
from .norm import RMSNorm
from .rope import apply_rope, rope_frequencies, rope_tables
from .swiglu import swiglu
from .variants import VARIANTS, Variant

__all__ = [
    "VARIANTS",
    "AdaptedLayer",
    "AdapterPart",
    "Again",
    "Embedding4bit",
    "Linear4bit",
    "LoRALinear",
    "RMSNorm",
    "Variant",
    "apply_rope",
    "linear_cross_entropy",
    "linear_together",
    "rope_frequencies",
    "rope_tables",
    "swiglu",
    "token_losses",
]
