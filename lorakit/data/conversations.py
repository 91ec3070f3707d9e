"""The parts of a data set in any file format, `Message` and `Record`, and the check of a conversation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import MOST_LISTED, DataError, did_you_mean, first_few
from ..models.chat_template import REASONING_KEYS, ChatMessages

ROLES = ("system", "user", "assistant", "tool")
ANSWER_KEYS = ("tool_calls", *REASONING_KEYS)  # keys of an assistant's message
MESSAGE_KEYS = ("name", "tool_call_id", *ANSWER_KEYS)  # what a message may hold besides its role and content

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
    """One turn of a conversation.

    Attributes:
        role: one of `ROLES`.
        content: the text.
        extra: other keys that chat templates read, one of `MESSAGE_KEYS` each. A "content" among them is the content
            as the record has it where that is no string: a list of text parts, or None beside tool calls.
    """

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the message as chat templates and JSON Lines files take it."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation, its source ("train.jsonl:17"), and its line's other keys in `extra`."""

    messages: tuple[Message, ...]
    source: str
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """The JSON Schemas of the functions that the conversation may call: the line's key "tools"."""
        return self.extra.get("tools")

    def as_dicts(self) -> ChatMessages:
        """Return the messages, with the tools, as `Tokenizer.render_chat` takes them."""
        return ChatMessages((message.as_dict() for message in self.messages), self.tools)


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


def texts_in(value: Any) -> Iterator[str]:
    """Yield every string in a JSON value, keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from texts_in(key)
            yield from texts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_in(item)


def check_conversation(record: Record) -> None:
    """Make sure that a record, of any format, is a conversation that a model can learn from.

    Raises:
        DataError: a role is unknown, a text cannot be encoded, tools or tool calls do not have the form that chat
            templates read, or no assistant turn says anything.
    """
    for number, message in enumerate(record.messages, start=1):
        where = f"{record.source}: message {number}"
        if message.role not in ROLES:
            expected = f"expected one of {', '.join(ROLES)}{_nearest_role(message.role)}"
            raise DataError(f'{where} has the unknown role "{message.role}"; {expected}')
        if message.role != "assistant" and (wrong := [key for key in ANSWER_KEYS if key in message.extra]):
            raise DataError(f"{where}: \"{wrong[0]}\" belongs in an assistant's message, this one is '{message.role}'")
        if len(several := [key for key in REASONING_KEYS if key in message.extra]) > 1:
            raise DataError(f'{where} gives the reasoning twice, as "{several[0]}" and "{several[1]}"')
        if "tool_calls" in message.extra:
            _check_tool_calls(message.extra["tool_calls"], where)
        if message.role == "assistant" and not message.content.strip() and not message.extra.get("tool_calls"):
            raise DataError(f"{where}: the assistant's content is empty, so nothing to learn")
        if any(_has_surrogate(text) for text in texts_in(message.as_dict())):
            raise DataError(f"{where}: the content holds half of a surrogate pair, which no UTF-8 text can")
    if not any(message.role == "assistant" for message in record.messages):
        raise DataError(f"{record.source}: there is no assistant turn, so nothing to learn")
    _check_tools(record)


def _check_tool_calls(calls: Any, where: str) -> None:
    """Raise DataError unless the calls are [{"function": {"name": string, "arguments": object or string}}, ...].

    A call without the wrapper "function" is as good: templates take both.
    """
    if not isinstance(calls, list):
        raise DataError(f'{where}: "tool_calls" must be a list of objects')
    for number, call in enumerate(calls, start=1):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f'{where}: tool call {number} must be an object with "function": {{"name": ...}}')
        if not isinstance(function.get("arguments", {}), dict | str):
            raise DataError(f'{where}: the "arguments" of tool call {number} must be an object or a string')


def _check_tools(record: Record) -> None:
    tools: Any = record.tools
    if tools is None:
        return
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f'{record.source}: "tools" must be a list of objects, the JSON Schemas of functions')
    if any(_has_surrogate(text) for text in texts_in(tools)):
        raise DataError(f'{record.source}: "tools" holds half of a surrogate pair, which no UTF-8 text can')


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _nearest_role(role: str) -> str:
    alias = _ALIASES.get(role.casefold())
    return f"; did you mean '{alias}'?" if alias else did_you_mean(role.casefold(), ROLES)
