"""The format that chat services and trainers share: {"messages": [{"role": "user", "content": "Hi"}, ...]}.

A message may also hold what tools and reasoning need, under the names that chat templates read, and the object "tools".
"""

from __future__ import annotations

from typing import Any

from ...errors import DataError
from ..conversations import MESSAGE_KEYS, Message, Record
from .record_format import RecordFormat, found_instead, json_type

# Names of the same keys in ShareGPT and its relatives that are not near in spelling.
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
}


def _parse(value: dict[str, Any], source: str) -> Record:
    messages = value.pop("messages")
    if not isinstance(messages, list):
        raise DataError(f'{source}: "messages" must be a list, found {json_type(messages)}')
    if not messages:
        raise DataError(f'{source}: "messages" is empty; expected at least one assistant turn')
    turns = tuple(_parse_message(item, f"{source}: message {number}") for number, item in enumerate(messages, start=1))
    return Record(turns, source, value)


def _parse_message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(f'{where} must be an object with "role" and "content", found {json_type(value)}')
    # Some services write every key that they know, without a value where it does not apply.
    given = {key: item for key, item in value.items() if item is not None or key in ("role", "content")}
    if given.get("tool_calls"):
        given.setdefault("content", None)
    for key in ("role", "content"):
        if key not in given:
            raise DataError(f'{where} has no "{key}"{found_instead(value, key, _ALIASES)}')
    role, content = given.pop("role"), given.pop("content")
    if not isinstance(role, str):
        raise DataError(f'{where}: "role" must be a string, found {json_type(role)}')
    # In other trainers, keys such as "weight" change the training; do not drop them in silence.
    if unknown := [key for key in given if key not in MESSAGE_KEYS]:
        known = ", ".join(("role", "content", *MESSAGE_KEYS))
        raise DataError(f'{where} has the unknown key "{unknown[0]}"; a message holds {known}')
    for key, item in given.items():
        if key != "tool_calls" and not isinstance(item, str):
            raise DataError(f'{where}: "{key}" must be a string, found {json_type(item)}')
    if isinstance(content, str):
        return Message(role, content, given)
    if content is None and given.get("tool_calls"):
        return Message(role, "", {**given, "content": None})
    return Message(role, _text_of(content, where), {**given, "content": content})


def _text_of(parts: Any, where: str) -> str:
    """Return the text of a content's parts, [{"type": "text", "text": "Hi"}, ...]."""
    if not isinstance(parts, list):
        raise DataError(f'{where}: "content" must be a string, found {json_type(parts)}')
    texts = []
    for number, part in enumerate(parts, start=1):
        kind = part.get("type") if isinstance(part, dict) else json_type(part)
        if kind != "text":
            raise DataError(f'{where}: part {number} of the content is "{kind}"; lorakit trains on text alone')
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise DataError(f'{where}: part {number} of the content must be {{"type": "text", "text": a string}}')
        texts.append(part["text"])
    return "".join(texts)


MESSAGES = RecordFormat(("messages",), _parse, _ALIASES)
