"""Layers with hand-written forward and backward passes."""

from torch import nn

from .adapted import AdaptedLayer
from .adapter_module import AdapterModule, AdapterSpec, Counted
from .frozen.embedding4bit import Embedding4bit
from .frozen.linear4bit import Linear4bit
from .frozen.linear_cross_entropy import linear_cross_entropy, token_losses
from .frozen.norm import RMSNorm
from .frozen.residual4bit import ResidualLinear4bit
from .frozen.rope import apply_rope, rope_frequencies, rope_tables
from .in_use import AdaptersInUse
from .lora_conv import LoRAConv
from .lora_embedding import LoRAEmbedding
from .lora_linear import LoRALinear, Recompute, linear_together
from .lora_parameter import LoRAParameter
from .row_adapters import BASE, RowAdapters, RowAware
from .saved_module import SavedModule
from .tied_module import TiedModule
from .trained_tokens import TrainedTokens
from .variants import VARIANTS, AttachedAdapter, FrozenWeight, Variant, variants_read

# The first class that fits a module adapts it. A new kind of layer is one file and one name here.
LAYER_KINDS: tuple[type[AdaptedLayer], ...] = (LoRALinear, LoRAEmbedding, LoRAConv)


def adapted_kind(module: nn.Module) -> type[AdaptedLayer] | None:
    """Return the class that adapts a module, or None if it cannot be adapted."""
    return next((kind for kind in LAYER_KINDS if kind.fits(module)), None)


__all__ = [
    "BASE",
    "LAYER_KINDS",
    "VARIANTS",
    "AdaptedLayer",
    "AdapterModule",
    "AdapterSpec",
    "AdaptersInUse",
    "AttachedAdapter",
    "Counted",
    "Embedding4bit",
    "FrozenWeight",
    "Linear4bit",
    "LoRAConv",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRAParameter",
    "RMSNorm",
    "Recompute",
    "ResidualLinear4bit",
    "RowAdapters",
    "RowAware",
    "SavedModule",
    "TiedModule",
    "TrainedTokens",
    "Variant",
    "adapted_kind",
    "apply_rope",
    "linear_cross_entropy",
    "linear_together",
    "rope_frequencies",
    "rope_tables",
    "token_losses",
    "variants_read",
]
