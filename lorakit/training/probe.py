"""`TrainingProbe`: an observer of a training run. The trainer calls it at fixed points of each step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..data import Batch, Example


class TrainingProbe:
    """Observes a training run; `train(..., probes=[...])` calls these methods, which do nothing by default.

        begin
        for each step:
            before_step
            for each micro-batch: after_micro_batch       gradients so far are in the parameters' .grad
            before_update                                 gradients are complete, but not clipped yet
            after_update                                  the optimizer has taken its step
            after_step                                    the step's row is in the log; no checkpoint is written yet
        end                                               also after an error

    A probe only reads. It changes no parameter and no gradient and draws no random number, so a run gives the same bits
    with and without probes. An error in a probe stops the run.
    """

    def begin(
        self, model: nn.Module, examples: Sequence[Example], held_out: Sequence[Example], output: Path | None, done: int
    ) -> None:
        """Get ready, before the first step.

        Args:
            examples: the training examples.
            held_out: the examples for the held-out loss; may be empty.
            output: the run's folder, which may not exist yet; None if nothing is written.
            done: steps taken before a resume, else 0.
        """

    def before_step(self, step: int) -> None:
        """A step begins; `step` counts from 1."""

    def after_micro_batch(self, examples: Sequence[Example], batch: Batch, losses: Tensor) -> None:
        """One forward and backward pass is done.

        Args:
            examples: the examples of the batch, in its order.
            losses: (trained tokens,) fp32, nats, in the order of the batch's trained targets.
        """

    def before_update(self) -> None:
        """The gradient of the step is complete."""

    def after_update(self) -> None:
        """The parameters have moved; their gradients are still there, clipped."""

    def after_step(self, row: dict[str, Any]) -> None:
        """The step is over; `row` is its line of the log."""

    def end(self) -> None:
        """Release the model and close files."""
