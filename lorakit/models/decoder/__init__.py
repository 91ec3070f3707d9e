"""The decoder: its shape, its blocks, attention, the model families, activation checkpointing and the loss."""

from .config import DecoderConfig
from .decoder import Decoder
from .families import FAMILIES

__all__ = ["FAMILIES", "Decoder", "DecoderConfig"]
