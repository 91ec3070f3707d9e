"""Output head and cross-entropy in one, chunk by chunk, so that (tokens, vocabulary) is never held.

With a vocabulary of 49,152, the fp32 logits of 2,048 tokens and their gradient take 805 MB; a chunk in bf16 takes 32.
The forward pass computes the gradient, which overwrites the chunk's logits.
"""

from __future__ import annotations

from typing import Any

import lorakit_kernels as kernels
import torch
from torch import Tensor

from ...errors import GradientError, ShapeError
from ...sums import product

_NO_SECOND = (
    "linear_cross_entropy has no second derivatives, since it does not keep the hidden states; for those, compute the "
    "logits and torch.nn.functional.cross_entropy of them, or use torch.func"
)
CHUNK_ELEMENTS = 1 << 24  # logits held at a time: 32 MiB in bf16, 341 rows of a vocabulary of 49,152


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, losses: Tensor | None = None) -> Tensor:
    """Return the summed negative log-likelihood of the targets under softmax(hidden @ weight.T), shape ().

    Value (fp32 or better) and gradient equal those of cross_entropy((hidden @ weight.T).float(), targets,
    reduction="sum"). The weight is frozen and gets no gradient.

    Args:
        hidden: (tokens, hidden); leave out untrained tokens, so that they cost nothing.
        weight: (vocabulary, hidden), frozen.
        targets: (tokens,) int64.
        losses: (tokens,) fp32 to fill with the loss of each token, for monitoring; or None.

    Raises:
        ShapeError: the number of targets is not the number of rows of `hidden`.
        GradientError: in the backward pass of a backward pass.
    """
    if kernels.is_transformed():
        each = _token_losses(hidden, weight, targets)
        if losses is not None:
            losses.copy_(each)
        return each.sum(dtype=torch.float64).to(each.dtype)
    result: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, losses)[0]
    return result


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood of each target, (tokens,) fp32, without gradient.

    The arguments are those of `linear_cross_entropy`.
    """
    with torch.no_grad():
        return _token_losses(hidden, weight, targets)


def _token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    losses = [kernels.cross_entropy(_logits(h, weight), t, False) for h, t in _chunks(hidden, weight, targets)]
    return torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32)


class _LinearCrossEntropy(torch.autograd.Function):
    """d loss / d hidden = (softmax(logits) − onehot(target)) @ weight, computed in forward and scaled in backward.

    This gradient is a result too, so that a second derivative through it comes here, where it is refused: it needs the
    hidden states, which are not kept.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, losses: Tensor | None) -> Any:
        total = hidden.new_zeros((), dtype=torch.float64)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        start = 0
        for h, t in _chunks(hidden, weight, targets):
            logits = _logits(h, weight)
            chunk_losses = kernels.cross_entropy(logits, t, gradient is not None)
            total += chunk_losses.sum(dtype=torch.float64)
            if losses is not None:
                losses[start : start + len(t)] = chunk_losses
            if gradient is not None:  # the logits now hold their own gradient
                gradient[start : start + len(t)] = product(logits, weight.to(hidden.dtype))
            start += len(t)
            del logits  # frees this chunk before the next one is made
        if gradient is not None:
            ctx.save_for_backward(gradient)
            ctx.set_materialize_grads(False)
        return total.to(torch.promote_types(hidden.dtype, torch.float32)), gradient

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        (gradient,), (factor, of_gradient) = ctx.saved_tensors, grads
        if of_gradient is not None and not torch.compiler.is_compiling():  # which fills in zeros
            raise GradientError(_NO_SECOND)
        # The factor stays fp32: 1 / 300 in bf16 would shorten every gradient of a step by 0.2%.
        return None if factor is None else gradient * factor, None, None, None


def _chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    if hidden.shape[:1] != targets.shape:
        raise ShapeError(f"targets must be ({len(hidden)},), one per row of hidden; got {tuple(targets.shape)}")
    rows = max(1, CHUNK_ELEMENTS // len(weight))
    return list(zip(hidden.split(rows), targets.split(rows), strict=True)) if len(hidden) else []


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return product(hidden, weight.to(hidden.dtype).T)
