"""Chat templates: finding, compiling and rendering them as transformers does, in Jinja2's immutable sandbox.

A template is code that came with a checkpoint. The sandbox keeps it from reaching Python's internals and from changing
its messages.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any, SupportsIndex, overload

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import CheckpointError, DataError

TEMPLATE_FILE = "chat_template.jinja"
ADDITIONAL_FOLDER = "additional_chat_templates"  # beside the template file
WITH_TOOLS = "tool_use"  # the name of a second template, for conversations that have tools
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # names of an assistant's reasoning in data sets

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


class ChatMessages(list[dict[str, Any]]):
    """The messages of a conversation, with the tools that it may call, so that whoever passes them on passes both."""

    def __init__(self, messages: Iterable[dict[str, Any]], tools: Tools | None = None) -> None:
        super().__init__(messages)
        self.tools = tools

    @overload
    def __getitem__(self, item: SupportsIndex) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, item: slice) -> ChatMessages: ...
    def __getitem__(self, item: SupportsIndex | slice) -> dict[str, Any] | ChatMessages:
        """Return a message, or the messages of a slice with the same tools."""
        found = super().__getitem__(item)
        return ChatMessages(found, self.tools) if isinstance(found, list) else found


class ChatTemplate:
    """One compiled template.

    Attributes:
        source: the template's text.
        where: the file it came from, for error messages.
        with_tools: the template for conversations that have tools, if the checkpoint has one of its own for them.
        is_dated: whether it asks for the date.

    Raises:
        CheckpointError: the template does not parse; names the file and the template's line.
    """

    def __init__(self, source: str, where: Path, with_tools: ChatTemplate | None = None) -> None:
        self.source, self.where, self.with_tools = source, where, with_tools
        self.is_dated: bool = "strftime_now" in source or (with_tools is not None and with_tools.is_dated)
        try:
            self._compiled = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"{where}: chat template, line {error.lineno}: {error.message}") from None

    def render(
        self,
        messages: Messages,
        tokens: Mapping[str, str],
        add_generation_prompt: bool,
        tools: Tools | None,
        day: date,
    ) -> str:
        """Render a conversation.

        Args:
            messages: the conversation; a key whose value is None counts as absent. Reasoning may have any of the names
                in `REASONING_KEYS`.
            tokens: the special tokens that templates refer to, such as {"bos_token": "<s>"}.
            add_generation_prompt: end with the opening of an assistant turn.
            tools: JSON Schemas of the functions that the conversation may call.
            day: the date for templates that ask for today's.

        Raises:
            DataError: there are no messages, one is not a mapping, or the template refuses or fails on them.
        """
        if not messages:
            raise DataError("a conversation needs at least one message")
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping):
                raise DataError(f"message {index} is a {type(message).__name__}, expected a mapping")
        if tools is not None and self.with_tools is not None:
            return self.with_tools.render(messages, tokens, add_generation_prompt, tools, day)
        conversation = [_as_templates_read(message) for message in messages]
        try:
            return self._compiled.render(
                messages=conversation,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=day.strftime,
                **tokens,
            )
        except Exception as error:  # a template can fail like any code: TypeError, OverflowError, UndefinedError, ...
            line = _template_line(error)
            if isinstance(error, _Refusal):
                raise DataError(f"{self.where}: chat template, line {line}, refuses these messages: {error}") from None
            what = f"{type(error).__name__}: {error}"
            raise DataError(f"{self.where}: chat template, line {line}, fails on these messages: {what}") from error


def find_chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
    """Return a checkpoint's template: chat_template.jinja, else tokenizer_config.json's (if several, the "default").

    A second template with the name "tool_use" is for conversations that have tools.

    Raises:
        CheckpointError: the template does not parse, or the entry has neither of its two forms.
    """
    path = folder / TEMPLATE_FILE
    if path.is_file():
        try:
            more = folder / ADDITIONAL_FOLDER / f"{WITH_TOOLS}.jinja"
            with_tools = ChatTemplate(more.read_text(encoding="utf-8"), more) if more.is_file() else None
            return ChatTemplate(path.read_text(encoding="utf-8"), path, with_tools)
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
    where = folder / "tokenizer_config.json"
    source = tokenizer_config.get("chat_template")
    with_tools = None
    if isinstance(source, list):
        try:
            named = {item["name"]: item["template"] for item in source}
        except (TypeError, KeyError):
            raise CheckpointError(f"{where}: chat_template is a list; each item needs 'name' and 'template'") from None
        source = named.get("default")
        with_tools = ChatTemplate(named[WITH_TOOLS], where) if WITH_TOOLS in named else None
    if source is None:
        return None
    if not isinstance(source, str):
        raise CheckpointError(f"{where}: chat_template is a {type(source).__name__}, expected a string")
    return ChatTemplate(source, where, with_tools)


def today() -> date:
    """Return the date of today, which a tokenizer that is loaded now gives to templates."""
    return datetime.now().date()


class _Refusal(jinja2.TemplateError):
    """The error that a template raises through `raise_exception`."""


class _GenerationBlock(Extension):
    """Parses {% generation %}...{% endgeneration %}, which marks an assistant's words, and renders its contents.

    It is a call block, as in transformers: a variable set inside stays inside.
    """

    tags = {"generation"}  # noqa: RUF012  # the attribute's name and type are Jinja2's

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Any) -> str:
        return str(caller())


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without the HTML escapes of Jinja2's own filter, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise _Refusal(message)


def _as_templates_read(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message without the keys that have no value, and with its reasoning under the names templates read."""
    present = {key: value for key, value in message.items() if value is not None}
    reasoning = next((present[key] for key in REASONING_KEYS if key in present), None)
    return present if reasoning is None else {"thinking": reasoning, **present, "reasoning_content": reasoning}


def _template_line(error: Exception) -> int | str:
    """Return the line of the template where an error comes from; Jinja2 adds it to the traceback as a frame."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return (lines[-1] if lines else None) or "?"
