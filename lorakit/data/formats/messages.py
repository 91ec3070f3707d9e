"""The format that chat services and trainers share: {"messages": [{"role": "user", "content": "Hi"}, ...]}."""

from __future__ import annotations

from typing import Any

from ...errors import DataError
from ..records import Message, Record
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
    for key in ("role", "content"):
        if key not in value:
            raise DataError(f'{where} has no "{key}"{found_instead(value, key, _ALIASES)}')
        if not isinstance(value[key], str):
            raise DataError(f'{where}: "{key}" must be a string, found {json_type(value[key])}')
    # In other trainers, keys such as "weight" or "tool_calls" change the training; do not drop them in silence.
    if unknown := [key for key in value if key not in ("role", "content")]:
        raise DataError(f'{where} has the unknown key "{unknown[0]}"; a message holds "role" and "content" only')
    return Message(value["role"], value["content"])


MESSAGES = RecordFormat(("messages",), _parse, _ALIASES)
