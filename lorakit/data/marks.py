"""Marks in place of what a record says: they show where a chat template puts each text, and which it leaves out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from ..models.chat_template import REASONING_KEYS, Messages, Tools

# Private-use characters: no template tests for them or strips them. `tojson` may write them in ASCII.
_BEGIN, _END = "\ue000", "\ue001"
_MARK = re.compile(r"(?:\ue000|\\ue000)([0-9]+)(?:\ue001|\\ue001)")

Path = tuple[str | int, ...]  # keys into [messages, tools]


@dataclass(frozen=True, slots=True)
class Part:
    """One text of a record.

    Attributes:
        number: of its mark.
        message: index of its message; None in the tools.
        path: the keys that lead to it in [messages, tools].
        text: the text; the JSON of a number.
        what: its name in messages to the user.
        kind: the role of its message, "name" or "tools".
    """

    number: int
    message: int | None
    path: Path
    text: str
    what: str
    kind: str

    @property
    def mark(self) -> str:
        """The characters that stand for it in a marked conversation."""
        return f"{_BEGIN}{self.number}{_END}"


def parts_of(messages: Messages, tools: Tools | None) -> list[Part]:
    """Return the texts that a rendering of the conversation has to show; those of white space alone do not count.

    What ties a result to its call is not among them, since many templates go without: the id, and a tool's name beside
    its result.

    Raises:
        DataError: a text holds the characters of a mark.
    """
    places = [
        (*place, message["role"]) for index, message in enumerate(messages) for place in _places_of(index, message)
    ]
    for index, tool in enumerate(tools or ()):
        path, function = _function_of((1, index), tool)
        places += [
            ((*path, name), function[name], f'the {name} of tool {index + 1} in "tools"', "tools")
            for name in ("name", "description")
            if name in function
        ]
    kept = [(path, str(text), what, kind) for path, text, what, kind in places if str(text).strip()]
    parts = []
    for number, (path, text, what, kind) in enumerate(kept):
        if _MARK.search(text):
            raise DataError(f"{what} holds a number between U+E000 and U+E001, which lorakit uses to find texts")
        message = int(path[1]) if path[0] == 0 else None
        parts.append(Part(number, message, path, text, what, "name" if path[2:] == ("name",) else kind))
    return parts


def marked(messages: Messages, tools: Tools | None, parts: Sequence[Part]) -> tuple[Messages, Tools | None]:
    """Return the conversation with each part's text replaced by its mark."""
    return with_texts(messages, tools, {part.path: part.mark for part in parts})


def probed(messages: Messages, tools: Tools | None, part: Part) -> tuple[Messages, Tools | None]:
    """Return the conversation with one part's mark in the middle of its text: a template may read how a text begins."""
    middle = len(part.text) // 2
    return with_texts(messages, tools, {part.path: part.text[:middle] + part.mark + part.text[middle:]})


def with_texts(messages: Messages, tools: Tools | None, texts: Mapping[Path, str]) -> tuple[Messages, Tools | None]:
    """Return a copy of the conversation with other texts at some paths."""
    both = _replaced([messages, tools], (), texts)
    return both[0], both[1]


def split_at_marks(text: str) -> tuple[list[str], list[int]]:
    """Return the stretches between marks (one more than marks), and the marks' numbers."""
    pieces = _MARK.split(text)
    return pieces[::2], [int(number) for number in pieces[1::2]]


def _places_of(index: int, message: Mapping[str, Any]) -> Iterator[tuple[Path, Any, str]]:
    """Yield (path, text, name) for the texts of a message."""
    role, content = message["role"], message.get("content")
    if isinstance(content, str):
        yield (0, index, "content"), content, f"the {role} message"
    else:
        for number, part in enumerate(content or ()):
            yield (0, index, "content", number, "text"), part["text"], f"part {number + 1} of the {role} message"
    for key in REASONING_KEYS:
        if message.get(key) is not None:
            yield (0, index, key), message[key], f'the "{key}" of the assistant message'
            break
    if "name" in message and role != "tool":
        yield (0, index, "name"), message["name"], f'the "name" of the {role} message'
    for number, call in enumerate(message.get("tool_calls") or ()):
        path, function = _function_of((0, index, "tool_calls", number), call)
        yield (*path, "name"), function["name"], f"the name of tool call {number + 1}"
        for place, value in _scalars(function.get("arguments"), (*path, "arguments")):
            yield place, value, f"the arguments of tool call {number + 1}"


def _function_of(path: Path, wrapped: Mapping[str, Any]) -> tuple[Path, Mapping[str, Any]]:
    """Return a tool or a call without its wrapper {"type": "function", "function": ...}, and the path to it."""
    inner = wrapped.get("function")
    return ((*path, "function"), inner) if isinstance(inner, Mapping) else (path, wrapped)


def _scalars(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _scalars(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _scalars(item, (*path, index))
    elif value is not None:
        yield path, value


def _replaced(value: Any, path: Path, texts: Mapping[Path, str]) -> Any:
    if path in texts:
        return texts[path]
    if isinstance(value, Mapping):
        return {key: _replaced(item, (*path, key), texts) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, (*path, index), texts) for index, item in enumerate(value)]
    return value
