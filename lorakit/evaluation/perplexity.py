"""Perplexity on a text unrelated to the task: the effect of tuning on everything else."""

from __future__ import annotations

import math

import torch

from ..errors import DataError
from ..models import Decoder, Tokenizer
from ..models.arguments import check_decoder, check_tokenizer
from ..models.decoder.loss import sequence_losses


def perplexity(model: Decoder, tok: Tokenizer, text: str, window: int = 512) -> float:
    """Return exp(mean negative log-likelihood per token) of a text, read in windows that do not overlap.

    Each window begins with what the tokenizer puts before every text (`Tokenizer.prefix_ids`), such as BOS, since
    models that were trained with it predict badly without it. Every token of the text then has a context and counts.

    Args:
        window: tokens per window, prefix included, at most the model's context. Without a prefix, the first token of
            each window has no context and is not counted.

    Raises:
        ConfigError: the model or the tokenizer is not lorakit's.
        DataError: no token of the text has a context.
    """
    check_decoder(model, "perplexity")
    check_tokenizer(tok)
    prefix = tok.prefix_ids
    ids = tok.encode_prompt(text)[len(prefix) :]
    size = max(1, min(window, model.config.context_length) - len(prefix))
    pieces = [[*prefix, *ids[start : start + size]] for start in range(0, len(ids), size)]
    first = max(1, len(prefix))  # the first of these tokens has no context, the others are not of the text
    windows = [torch.tensor(piece, device=model.device) for piece in pieces if len(piece) > first]
    if not windows:
        raise DataError(f"perplexity needs a text of at least {1 if prefix else 2} tokens, got {len(ids)}")
    losses = torch.cat([sequence_losses(model, piece)[first - 1 :] for piece in windows])
    mean = float(losses.double().mean())
    return math.exp(mean) if mean < 700 else math.inf
