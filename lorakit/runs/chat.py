"""A conversation with a run's model."""

from __future__ import annotations

from pathlib import Path

from ..data import Record, iter_records
from ..errors import LorakitError
from ..models.chat_template import ChatMessages
from .recipe import Recipe
from .run import load_run


class Chat:
    """Keeps the turns of one conversation with the tuned or the base model of a run.

    Args:
        folder: the run's folder.
        adapted: whether to use the adapter, or the base model alone.
        system: the system prompt; None: that of the run's training data, if it can still be read. The tools are always
            theirs.
    """

    def __init__(self, folder: Path, adapted: bool = True, system: str | None = None) -> None:
        self.model, self.tok, recipe = load_run(folder, adapted)
        self.description = f"{recipe.model.path} {'with ' + str(folder / 'adapter') if adapted else 'without adapter'}"
        first = _first_record(recipe)
        system = _system_prompt(first) if system is None else system
        opening = [{"role": "system", "content": system}] if system else []
        self.messages = ChatMessages(opening, first.tools if first else None)

    def ask(self, text: str) -> ChatMessages:
        """Add a user turn; return the conversation so far."""
        self.messages.append({"role": "user", "content": text})
        return self.messages

    def answer(self, text: str) -> None:
        """Add the model's turn."""
        self.messages.append({"role": "assistant", "content": text})


def _first_record(recipe: Recipe) -> Record | None:
    try:
        return next(iter_records(recipe.data.train, recipe.data.format))
    except (LorakitError, StopIteration):
        return None


def _system_prompt(first: Record | None) -> str | None:
    """Return the system prompt of the first training record."""
    return first.messages[0].content if first and first.messages[0].role == "system" else None
