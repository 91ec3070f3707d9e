"""Conversations on disk: JSON Lines, one object with a "messages" list per line.

The format is the one chat services and trainers share: {"messages": [{"role": "user", "content": "Hi"}, ...]}. It is
checked strictly and completely: every bad line is reported in one error, because a run that stops at one typo after the
other wastes an afternoon, and a line that is skipped in silence is never found.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ..errors import MOST_LISTED, DataError, did_you_mean, first_few
from ..files import atomic_write

ROLES = ("system", "user", "assistant", "tool")

# Names that other formats give to the same things and that are not near in spelling: ShareGPT and its relatives.
_ALIASES = {
    "conversation": "messages",
    "conversations": "messages",
    "dialog": "messages",
    "dialogue": "messages",
    "turns": "messages",
    "from": "role",
    "speaker": "role",
    "text": "content",
    "value": "content",
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
        """Return the form that chat templates and JSON Lines files take."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation, where it came from ("train.jsonl:17"), and the keys of its line other than "messages"."""

    messages: tuple[Message, ...]
    source: str
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    def as_dicts(self) -> list[dict[str, str]]:
        """Return the messages as `Tokenizer.render_chat` takes them."""
        return [message.as_dict() for message in self.messages]


class Problems:
    """Collects what is wrong with a data set to raise it as one `DataError`: 20 problems in full, the rest counted."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.count = 0

    def add(self, problem: DataError) -> None:
        """Note one problem; its text carries its own "file:line: "."""
        self.count += 1
        if self.count <= MOST_LISTED:
            self.shown.append(str(problem))

    def raise_if_any(self) -> None:
        """Raise what was collected, or return when there is nothing.

        Raises:
            DataError: at least one problem was added.
        """
        if self.count:
            raise DataError("\n".join(first_few(self.shown, count=self.count)))


def load_records(path: str | os.PathLike[str]) -> list[Record]:
    """Read every conversation of a JSON Lines file.

    Blank lines are skipped, a byte order mark is tolerated, keys beside "messages" are kept in `Record.extra`.

    Raises:
        DataError: the file is missing or holds no record, or any line is bad. All bad lines are in one error, each as
            "file:line: what is wrong" (the first 20, then how many more).
    """
    return list(iter_records(path))


def iter_records(path: str | os.PathLike[str]) -> Iterator[Record]:
    """Yield the good records of a JSON Lines file one by one, the file never whole in memory.

    Raises:
        DataError: as `load_records`, after the last line: only a loop that ran to its end has seen a sound file.
    """
    file_path = _existing_file(Path(path))
    problems = Problems()
    found = 0
    try:
        with open(file_path, "rb") as file:  # bytes: only "\n" ends a line, and bad UTF-8 stays the fault of one line
            for number, raw in enumerate(file, start=1):
                raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                if not raw.strip():
                    continue
                found += 1
                try:
                    record = parse_record(raw, f"{file_path.name}:{number}")
                except DataError as problem:
                    problems.add(problem)
                else:
                    yield record
    except OSError as error:
        raise DataError(f"cannot read {file_path}: {error.strerror or error}") from error
    problems.raise_if_any()
    if not found:
        raise DataError(f'{file_path} is empty; expected one {{"messages": [...]}} object per line')


def parse_record(line: str | bytes, source: str) -> Record:
    """Read one line of a JSON Lines file; `source` names it in the record and in errors.

    Raises:
        DataError: the line is not valid UTF-8 or JSON, or not a conversation with an assistant turn to learn.
    """
    try:
        text = line.decode("utf-8") if isinstance(line, bytes) else line
        value = json.loads(text, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not valid UTF-8 at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{source}: not valid JSON: {error.msg} at character {error.pos + 1}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f'{source}: expected an object with "messages", found {_kind(value)}')
    if "messages" not in value:
        raise DataError(f'{source}: the key "messages" is missing{_found_instead(value, "messages")}')
    messages = _parse_messages(value.pop("messages"), source)
    return Record(messages, source, value)


def save_records(path: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """Write conversations as JSON Lines in UTF-8, whole or not at all.

    Each line is parsed again before it counts, so what was saved can be loaded.

    Raises:
        DataError: a record is not a valid conversation or its `extra` is not JSON; `path` is as it was.
        StorageError: the file cannot be written; `path` is as it was.
    """
    with atomic_write(path) as part, open(part, "w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(_line_of(record) + "\n")


def _line_of(record: Record) -> str:
    if "messages" in record.extra:
        raise DataError(f'{record.source}: extra holds the key "messages", which is the conversation\'s own')
    try:
        line = json.dumps({"messages": record.as_dicts(), **record.extra}, ensure_ascii=False, allow_nan=False)
        line.encode("utf-8")  # a lone surrogate passes through json.dumps
    except (TypeError, ValueError) as error:
        raise DataError(f"{record.source}: cannot be written as JSON: {error}") from error
    parse_record(line, record.source)
    return line


def _existing_file(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        raise DataError(f"{path} is a folder; expected a JSON Lines file")
    if not path.parent.is_dir():
        raise DataError(f"there is no file {path}: its folder does not exist")
    neighbors = [file.name for file in path.parent.iterdir() if file.is_file()]
    raise DataError(f"there is no file {path}{did_you_mean(path.name, neighbors)}")


def _parse_messages(value: Any, source: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise DataError(f'{source}: "messages" must be a list, found {_kind(value)}')
    if not value:
        raise DataError(f'{source}: "messages" is empty; expected at least one assistant turn')
    messages = tuple(_parse_message(item, f"{source}: message {number}") for number, item in enumerate(value, start=1))
    if not any(message.role == "assistant" for message in messages):
        raise DataError(f"{source}: there is no assistant turn, so nothing to learn")
    return messages


def _parse_message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(f'{where} must be an object with "role" and "content", found {_kind(value)}')
    for key in ("role", "content"):
        if key not in value:
            raise DataError(f'{where} has no "{key}"{_found_instead(value, key)}')
        if not isinstance(value[key], str):
            raise DataError(f'{where}: "{key}" must be a string, found {_kind(value[key])}')
    # Keys such as "weight" or "tool_calls" change what is trained elsewhere; dropping them in silence would not.
    if unknown := [key for key in value if key not in ("role", "content")]:
        raise DataError(f'{where} has the unknown key "{unknown[0]}"; a message holds "role" and "content" only')
    role, content = value["role"], value["content"]
    if role not in ROLES:
        expected = f"expected one of {', '.join(ROLES)}{_nearest_role(role)}"
        raise DataError(f'{where} has the unknown role "{role}"; {expected}')
    if role == "assistant" and not content.strip():
        raise DataError(f"{where}: the assistant's content is empty, so nothing to learn")
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise DataError(f"{where}: the content holds half of a surrogate pair, which no UTF-8 text can")
    return Message(role, content)


def _found_instead(value: dict[str, Any], wanted: str) -> str:
    """Name the keys that are there, and which of them was probably meant to be `wanted`."""
    if not value:
        return "; the object is empty"
    keys = ", ".join(f'"{key}"' for key in list(value)[:8])
    for key in value:
        if _ALIASES.get(key.casefold()) == wanted or did_you_mean(key.casefold(), [wanted]):
            return f"; found {keys}; did you mean '{wanted}' where it says '{key}'?"
    return f"; found {keys}"


def _nearest_role(role: str) -> str:
    alias = _ALIASES.get(role.casefold())
    return f"; did you mean '{alias}'?" if alias in ROLES else did_you_mean(role.casefold(), ROLES)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _kind(value: Any) -> str:
    """Return the JSON name of a value's type, for error messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
