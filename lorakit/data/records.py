"""The parts of a data set in any file format, `Message` and `Record`, and the check of a conversation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import MOST_LISTED, DataError, did_you_mean, first_few

ROLES = ("system", "user", "assistant", "tool")

# Other names for the roles that are not near in spelling.
_ALIASES = {
    "human": "user",
    "prompter": "user",
    "ai": "assistant",
    "bot": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "tool",
}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        """Return the message as chat templates and JSON Lines files take it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation, its source ("train.jsonl:17"), and its line's other keys in `extra`."""

    messages: tuple[Message, ...]
    source: str
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    def as_dicts(self) -> list[dict[str, str]]:
        """Return the messages as `Tokenizer.render_chat` takes them."""
        return [message.as_dict() for message in self.messages]


class Problems:
    """Collects the problems of a data set and raises them as one `DataError`: 20 in full, the rest counted."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.count = 0

    def add(self, problem: DataError) -> None:
        """Note one problem; its text carries its own "file:line: "."""
        self.count += 1
        if self.count <= MOST_LISTED:
            self.shown.append(str(problem))

    def raise_if_any(self) -> None:
        """Raise the collected problems, if there are any.

        Raises:
            DataError: at least one problem was added.
        """
        if self.count:
            raise DataError("\n".join(first_few(self.shown, count=self.count)))


def check_conversation(record: Record) -> None:
    """Make sure that a record, of any format, is a conversation that a model can learn from.

    Raises:
        DataError: a role is unknown, a content cannot be encoded, or no assistant turn says anything.
    """
    for number, message in enumerate(record.messages, start=1):
        where = f"{record.source}: message {number}"
        if message.role not in ROLES:
            expected = f"expected one of {', '.join(ROLES)}{_nearest_role(message.role)}"
            raise DataError(f'{where} has the unknown role "{message.role}"; {expected}')
        if message.role == "assistant" and not message.content.strip():
            raise DataError(f"{where}: the assistant's content is empty, so nothing to learn")
        if any("\ud800" <= character <= "\udfff" for character in message.content):
            raise DataError(f"{where}: the content holds half of a surrogate pair, which no UTF-8 text can")
    if not any(message.role == "assistant" for message in record.messages):
        raise DataError(f"{record.source}: there is no assistant turn, so nothing to learn")


def _nearest_role(role: str) -> str:
    alias = _ALIASES.get(role.casefold())
    return f"; did you mean '{alias}'?" if alias else did_you_mean(role.casefold(), ROLES)
