"""The losses of a chunk of logits. The gradient overwrites the logits, so no second matrix of that size is ever held.

Autograd does not differentiate this operation; the layer that calls it does. Other backends agree to the rounding of a
sum and an exponential.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import operation


def _empty_losses(logits: Tensor, targets: Tensor, with_gradient: bool) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))


@operation(writes=("logits",), written_if="with_gradient", fake=_empty_losses, by_definition=True)
def cross_entropy(logits: Tensor, targets: Tensor, with_gradient: bool) -> Tensor:
    """Return −log softmax(logits)[target] of each row, and on request overwrite the logits with the sum's gradient.

    Args:
        logits: (rows, vocabulary), contiguous.
        targets: (rows,) int64.
        with_gradient: overwrite the logits with softmax(logits) − onehot(target), rounded once from fp32.

    Returns:
        (rows,), fp32 or better.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    shifted = wide - wide.detach().amax(dim=-1, keepdim=True)
    # log_softmax sums with one accumulator per lane, which loses four digits over millions of logits.
    log_probs = shifted.sub_(shifted.exp().sum(dim=-1, keepdim=True).log_())
    losses = -log_probs.gather(1, targets[:, None]).squeeze(1)
    if with_gradient:
        gradient = torch.exp(log_probs, out=logits if logits.dtype == torch.float32 else log_probs)
        gradient[torch.arange(len(targets), device=targets.device), targets] -= 1
        if gradient is not logits:
            logits.copy_(gradient)
    return losses
