"""The language-model loss of a padding-free batch, for our decoders and for any model that returns logits."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from ...layers import linear_cross_entropy, token_losses
from .decoder import Decoder

_LEAST_SAVED = 1 / 16  # of the tokens: sharing costs attention a copy of the shared keys and values per sequence


def summed_loss(
    model: nn.Module, input_ids: Tensor, targets: Tensor, lengths: Sequence[int], losses: Tensor | None = None
) -> Tensor:
    """Return the summed negative log-likelihood of the targets, fp32, shape (), with gradient.

    The sum, not the mean: a step cut into micro-batches adds up sums and divides once, by all its trained tokens.

    Args:
        model: a `Decoder`, or a model that maps (input_ids, attention_mask) to an object with `.logits`.
        input_ids: (tokens,) int64, sequences laid end to end; `lengths` are theirs.
        targets: (tokens,) int64, the next token, or negative where it is not trained.
        losses: (trained tokens,) fp32, filled with each token's loss in order; None: only the sum is wanted.
    """
    if isinstance(model, Decoder):
        shared = 0
        if model.rows is None:  # rows with adapters of their own compute the same tokens differently
            input_ids, targets, lengths, shared = _share_prefix(input_ids, targets, lengths)
        trained = targets >= 0
        # Rows that train nothing, most of them where prompts are masked, skip the projection to the vocabulary.
        hidden = model.hidden_states(input_ids, lengths, shared=shared)[trained]
        head = model.get_output_embeddings()  # a LoRALinear where the head is adapted
        if isinstance(head, nn.Linear) and not head.weight.requires_grad:
            return linear_cross_entropy(hidden, head.weight, targets[trained], losses)
        with _trained_rows(model, trained, lengths):
            logits = head(hidden)
    else:
        trained = targets >= 0
        logits = _padded_logits(model, input_ids, lengths)[trained]
    each = cross_entropy(logits.float(), targets[trained], reduction="none")
    if losses is not None:
        losses.copy_(each.detach())
    return each.sum()


@torch.inference_mode()
def sequence_losses(model: Decoder, input_ids: Tensor) -> Tensor:
    """Return the negative log-likelihood of every token but the first: (tokens,) -> (tokens - 1,) fp32."""
    hidden = model.hidden_states(input_ids[:-1], [len(input_ids) - 1])
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        return token_losses(hidden, head.weight, input_ids[1:])
    return cross_entropy(head(hidden).float(), input_ids[1:], reduction="none")


def _share_prefix(
    input_ids: Tensor, targets: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, Tensor, Sequence[int], int]:
    """Keep the untrained tokens with which all sequences begin only once, at the front.

    A system prompt is often a third of a conversation or more; its hidden states are the same in each. The gradient
    is the same sum as before, gathered in one place.

    Returns:
        input_ids and targets (tokens,) with the shared tokens first, the length of each sequence's rest, and how many
        tokens are shared.
    """
    if min(lengths, default=0) < 2 or sum(lengths) != len(input_ids):
        return input_ids, targets, lengths, 0  # nothing to share, or lengths that the model refuses
    starts = torch.tensor([0, *itertools.accumulate(lengths)][:-1], device=input_ids.device)
    heads = starts[:, None] + torch.arange(min(lengths) - 1, device=input_ids.device)  # each keeps at least one token
    same = (input_ids[heads] == input_ids[heads[:1]]) & (targets[heads] < 0)
    shared = int(same.all(dim=0).cumprod(dim=0).sum())
    if shared * (len(lengths) - 1) < _LEAST_SAVED * len(input_ids):
        return input_ids, targets, lengths, 0
    keep = torch.ones_like(input_ids, dtype=torch.bool).index_fill_(0, heads[1:, :shared].reshape(-1), False)
    return input_ids[keep], targets[keep], [length - shared for length in lengths], shared


def _trained_rows(model: Decoder, trained: Tensor, lengths: Sequence[int]) -> contextlib.AbstractContextManager[None]:
    """Tell an adapted head how many hidden states of each row it gets, if rows have adapters of their own."""
    if model.rows is None:
        return contextlib.nullcontext()
    return model.rows.laid_out([int(row.sum()) for row in trained.split(list(lengths))])


def _padded_logits(model: nn.Module, input_ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """Run a model that knows only rectangles; return the logits of the real tokens, (tokens, vocab)."""
    rows = input_ids.split(list(lengths))
    padded = pad_sequence(list(rows), batch_first=True)  # (batch, longest), padded with 0, which the mask hides
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    logits: Tensor = model(input_ids=padded, attention_mask=mask).logits
    return logits[mask.bool()]
