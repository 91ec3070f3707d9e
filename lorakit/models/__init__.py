"""Decoders, checkpoints, tokenizers and generation."""

from ..checkpoints.checkpoint import Checkpoint
from .decoder.config import DecoderConfig
from .decoder.decoder import Decoder
from .decoder.families import FAMILIES
from .generate import generate
from .load import load_model
from .pretrained import KNOWN_MODELS, resolve_model
from .tokenizer.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "FAMILIES",
    "KNOWN_MODELS",
    "Checkpoint",
    "Decoder",
    "DecoderConfig",
    "Tokenizer",
    "generate",
    "load_model",
    "load_tokenizer",
    "resolve_model",
]
