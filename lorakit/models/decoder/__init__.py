"""The decoder: its shape, its blocks, the model families, attention, checkpointing and the loss."""

from .config import DecoderConfig
from .decoder import Decoder
from .families import FAMILIES

__all__ = ["FAMILIES", "Decoder", "DecoderConfig"]
