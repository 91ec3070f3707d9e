"""The text of a training run's result: its totals, and the rows of about ten steps."""

from __future__ import annotations

from typing import Any

from ..printed import Printed

_SHOWN = 10  # rows
_COLUMNS = {"step": "d", "loss": ".4f", "eval_loss": ".4f", "lr": ".2e", "grad_norm": ".3g", "tokens": ","}


class PrintedTraining(Printed):
    """Prints a `TrainResult`; the fields are described there."""

    steps: int
    history: list[dict[str, Any]]
    trained_tokens: int
    tokens: int
    seconds: float
    eval_loss: float | None

    def __str__(self) -> str:
        held_out = "" if self.eval_loss is None else f", held-out loss {self.eval_loss:.4f}"
        loss = f", loss {self.history[-1]['loss']:.4f}" if self.history else ""
        total = f"{self.steps} steps in {self.seconds:.1f} s, {self.trained_tokens:,} trained of {self.tokens:,} tokens"
        every = -(-len(self.history) // _SHOWN) or 1
        last = len(self.history) - 1
        shown = [row for index, row in enumerate(self.history) if (last - index) % every == 0]  # the last step is one
        columns = [name for name in _COLUMNS if any(name in row for row in shown)]
        cells = [[format(row[name], _COLUMNS[name]) if name in row else "" for name in columns] for row in shown]
        table = [columns, *cells] if shown else []
        widths = [max(len(line[index]) for line in table) for index in range(len(columns))]
        lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in table]
        return "\n".join([f"{total}{loss}{held_out}", *lines])
