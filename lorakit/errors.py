"""The errors that lorakit raises on purpose, and helpers that word them: the nearest right thing, a list of problems.

All derive from `LorakitError`, so `except LorakitError` catches them all. A second base class keeps
`except ValueError`, `except OSError` and `except RuntimeError` working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

MOST_LISTED = 20  # problems spelled out in one message


class LorakitError(Exception):
    """Base class of every deliberate error: what is wrong, where, what was expected, the nearest right thing."""


class ConfigError(LorakitError, ValueError):
    """A setting is unknown, of the wrong type or out of range.

    Attributes:
        problems: every problem found, as (dotted key, message); one error reports them all.
    """

    def __init__(self, message: str, problems: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.problems: list[tuple[str, str]] = list(problems)


class ShapeError(LorakitError, ValueError):
    """A tensor's shape or dtype is not the one the operation needs."""


class CheckpointError(LorakitError, ValueError):
    """A model, adapter or tokenizer file is missing, truncated, malformed or does not fit the model."""


class DataError(LorakitError, ValueError):
    """A record, conversation or batch cannot be trained or evaluated on."""


class AdapterError(LorakitError, ValueError):
    """An adapter cannot be attached, found, switched, loaded or saved."""


class TrainingError(LorakitError, RuntimeError):
    """Training cannot start or go on: nothing is trainable, the loss is not finite, a checkpoint does not fit."""


class GradientError(LorakitError, RuntimeError):
    """A gradient was asked for that is not computed, such as a second derivative of the fused loss."""


class StorageError(LorakitError, OSError):
    """Writing failed (disk full, no permission); the file or folder that was at the target is untouched."""


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the option nearest to `word`, or "" when none is near."""
    near = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def first_few(problems: Sequence[str], most: int = MOST_LISTED, count: int | None = None) -> list[str]:
    """Return the first `most` problems, one a line, then "(+N more)" if there are others.

    Args:
        count: the number of problems, if `problems` does not hold all of them.
    """
    hidden = (len(problems) if count is None else count) - most
    return [*problems[:most], *([f"(+{hidden} more)"] if hidden > 0 else [])]


def listing(problems: Sequence[str], most: int = MOST_LISTED) -> str:
    """Return the lines of `first_few`, each indented on a line of its own, to follow a message's colon."""
    return "".join(f"\n  {line}" for line in first_few(problems, most))
