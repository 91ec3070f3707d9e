"""The ways in which a low-rank update enters a layer, one file each; a new one is a file and a line in the table."""

from .dora import DoRA
from .plain import Plain
from .variant import Variant

__all__ = ["VARIANTS", "Variant"]

VARIANTS: dict[str, Variant] = {
    "plain": Plain(),
    "dora": DoRA(),
}
