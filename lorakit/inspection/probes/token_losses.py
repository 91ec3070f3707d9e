"""Token losses, which the training step computes anyway, by position in the answer and by conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...data import Batch, Example


@dataclass
class TokenLosses:
    """The losses of one step's trained tokens.

    Positions count the trained tokens of a conversation from 0 and are kept in bins that double: 0, 1-2, 3-6, 7-14, ...

    Attributes:
        sums, counts: nats and trained tokens, by bin.
        examples: (source, mean loss, trained tokens) of each conversation.
    """

    sums: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    examples: list[tuple[str, float, int]] = field(default_factory=list)

    def add(self, examples: Sequence[Example], batch: Batch, losses: Tensor) -> None:
        """Add a micro-batch with losses (trained tokens,) fp32; see `TrainingProbe.after_micro_batch`."""
        trained = [int((targets >= 0).sum()) for targets in batch.targets.split(batch.lengths)]
        each = losses.detach().double().cpu()
        positions = torch.cat([torch.arange(count) for count in trained])
        bins = torch.frexp((positions + 1).double()).exponent.long() - 1  # the exact integer part of log2
        size = int(bins.max()) + 1
        self.sums += [0.0] * (size - len(self.sums))
        self.counts += [0] * (size - len(self.counts))
        sums = torch.zeros(size, dtype=torch.float64).index_add_(0, bins, each).tolist()
        for index, (total, count) in enumerate(zip(sums, bins.bincount(minlength=size).tolist(), strict=True)):
            self.sums[index] += total
            self.counts[index] += count
        trained = [sum(example.loss_mask) for example in examples]  # an example may have several renderings
        for example, values in zip(examples, each.split(trained), strict=True):
            if len(values):
                self.examples.append((example.source, float(values.mean()), len(values)))

    def figures(self) -> dict[str, Any]:
        """Return the figures for the step's row."""
        return {"position_loss": self.sums, "position_tokens": self.counts, "examples": self.examples}


def bin_name(index: int) -> str:
    """Return the positions of a bin as text: "0", "1-2", "3-6"."""
    first, last = 2**index - 1, 2 ** (index + 1) - 2
    return str(first) if first == last else f"{first}-{last}"
