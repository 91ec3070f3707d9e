"""Perplexity on a text unrelated to the task: the effect of tuning on everything else."""

from __future__ import annotations

import math

import torch

from ..errors import DataError
from ..models import Decoder, Tokenizer
from ..models.decoder.loss import sequence_losses


def perplexity(model: Decoder, tok: Tokenizer, text: str, window: int = 512) -> float:
    """Return exp(mean negative log-likelihood per token) of a text, read in windows that do not overlap.

    Args:
        window: tokens per window, at most the model's context; the first token of each has no context and is not
            counted.

    Raises:
        DataError: the text has fewer than two tokens.
    """
    ids = torch.tensor(tok.encode(text), device=model.device)
    windows = [piece for piece in ids.split(min(window, model.config.context_length)) if len(piece) > 1]
    if not windows:
        raise DataError(f"perplexity needs a text of at least two tokens, got {len(ids)}")
    losses = torch.cat([sequence_losses(model, piece) for piece in windows])
    mean = float(losses.double().mean())
    return math.exp(mean) if mean < 700 else math.inf
