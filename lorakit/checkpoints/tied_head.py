"""Whether a checkpoint's output head is its embedding: config.json says it, and the tensors decide.

A file may hold a head with values of its own beside a config.json that calls it tied, because whoever trained the head
apart forgot the key. transformers 5 then uses the file's head; so does lorakit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TIED_KEY = "tie_word_embeddings"  # in config.json


def is_head_tied(checkpoint: Checkpoint, values: Mapping[str, Any], embedding: str = EMBEDDING) -> bool:
    """Return whether config.json's `values` tie the head to the embedding and the tensors do not contradict them.

    Values are read only if config.json says so and the file holds a head all the same.

    Args:
        embedding: name of the embedding's tensor.
    """
    if not values.get(TIED_KEY, False):
        return False
    if HEAD not in checkpoint or embedding not in checkpoint:
        return True
    # A head in 4 bits has the shape of its packed bytes, and values of its own.
    same_shape = checkpoint.shape(HEAD) == checkpoint.shape(embedding)
    return same_shape and _are_equal(checkpoint.read(HEAD), checkpoint.read(embedding))


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Compare bit for bit, or by value where the dtypes differ; both are mapped files, so no copy is made of one."""
    if one.dtype == other.dtype:
        return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    wide = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(wide), other.to(wide))
