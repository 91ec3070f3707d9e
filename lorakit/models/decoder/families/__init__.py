"""The model families: one file each, and one line in `FAMILIES`.

A family is a set of switches of the one decoder (`DecoderShape`) and, where it has parts that no switch describes, its
own classes for attention, MLP or norm. Decoder, loader, planner, exports and GGUF import read the entry; none of them
knows a family by name.
"""

from __future__ import annotations

from ....errors import ConfigError, did_you_mean
from .family import Family, GGUFForm
from .llama import LLAMA
from .mistral import MISTRAL
from .qwen2 import QWEN2
from .qwen3 import QWEN3

__all__ = ["FAMILIES", "Family", "GGUFForm", "find_family"]

FAMILIES: dict[str, Family] = {family.architecture: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def find_family(architecture: str) -> Family:
    """Return the family of an architecture's name in config.json.

    Raises:
        ConfigError: there is no such family; the message names the nearest.
    """
    if architecture not in FAMILIES:
        known, near = ", ".join(FAMILIES), did_you_mean(architecture, FAMILIES)
        raise ConfigError(f"architecture '{architecture}' is not supported{near} (known: {known})")
    return FAMILIES[architecture]
