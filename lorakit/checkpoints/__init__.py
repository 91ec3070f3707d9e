"""Checkpoint folders: safetensors headers, reading in bands, writing shards, and weights that are already quantized."""

from .checkpoint import Checkpoint, read_config

__all__ = ["Checkpoint", "read_config"]
