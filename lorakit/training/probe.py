"""`TrainingProbe`: what may look on while a run trains. The trainer calls it at the turning points of each step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..data import Batch, Example


class TrainingProbe:
    """Looks on while a run trains; `train(..., probes=[...])` calls these methods, none of which does anything here.

        begin
        for each step:
            before_step
            for each micro-batch: after_micro_batch       gradients so far are in the parameters' .grad
            before_update                                 gradients are whole, and not clipped yet
            after_update                                  the optimizer has taken its step
            after_step                                    the step's row is in the log, no checkpoint is written yet
        end                                               also after an error

    A probe reads. It changes no parameter and no gradient and draws no random number, so that a run with probes is, to
    the bit, the run without. What a probe raises stops the run, as a full disk does.
    """

    def begin(
        self, model: nn.Module, examples: Sequence[Example], held_out: Sequence[Example], output: Path | None, done: int
    ) -> None:
        """Get ready, before the first step.

        Args:
            examples, held_out: what is trained on, and what the held-out loss is measured on; this may be empty.
            output: the run's folder, which may not exist yet; None where nothing is written.
            done: steps taken before a resume, else 0.
        """

    def before_step(self, step: int) -> None:
        """Step `step` begins, counted from 1."""

    def after_micro_batch(self, examples: Sequence[Example], batch: Batch, losses: Tensor) -> None:
        """One forward and backward pass is done.

        Args:
            examples: those of the batch, in its order.
            losses: (trained tokens,) fp32, nats, in the order of the batch's targets that are trained.
        """

    def before_update(self) -> None:
        """The gradient of the step is whole."""

    def after_update(self) -> None:
        """The parameters have moved; their gradients are still there, clipped."""

    def after_step(self, row: dict[str, Any]) -> None:
        """The step is over; `row` is its line of the log."""

    def end(self) -> None:
        """Let go of the model and of files."""
