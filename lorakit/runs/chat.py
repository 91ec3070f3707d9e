"""A conversation with a run's model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data import iter_records
from ..errors import LorakitError
from ..models.chat_template import ChatMessages
from .recipe import Recipe
from .run import load_run
from .run_folder import chat_of, read_chat


class Chat:
    """Keeps the turns of one conversation with the tuned or the base model of a run.

    Args:
        folder: the run's folder.
        adapted: whether to use the adapter, or the base model alone.
        system: the system prompt; None: that of the run's training data. The run keeps it, and their tools, which a
            chat always has; for a run without the file chat.json they are read from the data, if these are still there.
    """

    def __init__(self, folder: Path, adapted: bool = True, system: str | None = None) -> None:
        self.model, self.tok, recipe = load_run(folder, adapted)
        self.description = f"{recipe.model.path} {'with ' + str(folder / 'adapter') if adapted else 'without adapter'}"
        kept = _opening(folder, recipe)
        system = kept.get("system") if system is None else system
        opening = [{"role": "system", "content": str(system)}] if system else []
        self.messages = ChatMessages(opening, kept.get("tools"))

    def ask(self, text: str) -> ChatMessages:
        """Add a user turn; return the conversation so far."""
        self.messages.append({"role": "user", "content": text})
        return self.messages

    def answer(self, text: str) -> None:
        """Add the model's turn."""
        self.messages.append({"role": "assistant", "content": text})


def _opening(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Return how the run's chats begin: as it keeps it, or else as the first training record does."""
    if (kept := read_chat(folder)) is not None:
        return kept
    try:
        return chat_of(next(iter_records(recipe.data.train, recipe.data.format)))
    except (LorakitError, StopIteration):
        return {}
