"""The ways in which a low-rank update enters a layer, one file each; a new one is a file and a line in the table."""

from .dora import DoRA
from .lora_bias import LoRABias
from .plain import Plain
from .residual import Residual
from .variant import AttachedAdapter, FrozenWeight, Variant

__all__ = ["VARIANTS", "AttachedAdapter", "FrozenWeight", "Variant"]

VARIANTS: dict[str, Variant] = {
    "plain": Plain(),
    "dora": DoRA(),
    "lora_bias": LoRABias(),
    "residual": Residual(),
}
