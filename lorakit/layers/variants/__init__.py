"""The LoRA variants, one file each. A new variant is one file and one line in the table."""

from collections.abc import Mapping
from typing import Any

from .dora import DoRA
from .hira import HiRA
from .lora_bias import LoRABias
from .plain import Plain
from .residual import Residual
from .variant import AttachedAdapter, FrozenWeight, Variant

__all__ = ["VARIANTS", "AttachedAdapter", "FrozenWeight", "Variant", "variants_read"]

VARIANTS: dict[str, Variant] = {
    "plain": Plain(),
    "dora": DoRA(),
    "hira": HiRA(),
    "lora_bias": LoRABias(),
    "residual": Residual(),
}


def variants_read(values: Mapping[str, Any]) -> list[Variant]:
    """Return the variants that the settings in an adapter_config.json name. A valid file names one."""
    found = [variant for variant in VARIANTS.values() if variant.reads(values)]
    return [variant for variant in found if variant.switch] or found
