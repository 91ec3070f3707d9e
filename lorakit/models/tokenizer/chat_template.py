"""Chat templates: finding, compiling and rendering them as transformers does, in Jinja2's immutable sandbox.

A template is code that came with a checkpoint. The sandbox keeps it from reaching Python's internals and from changing
its messages.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...errors import CheckpointError, DataError

TEMPLATE_FILE = "chat_template.jinja"


class ChatTemplate:
    """One compiled template.

    Attributes:
        source: the template's text.
        where: the file it came from, for error messages.

    Raises:
        CheckpointError: the template does not parse; names the file and the template's line.
    """

    def __init__(self, source: str, where: Path) -> None:
        self.source, self.where = source, where
        try:
            self._compiled = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"{where}: chat template, line {error.lineno}: {error.message}") from None

    def render(
        self, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, str], add_generation_prompt: bool
    ) -> str:
        """Render a conversation.

        Args:
            messages: the conversation; a key whose value is None counts as absent.
            tokens: the special tokens that templates refer to, such as {"bos_token": "<s>"}.
            add_generation_prompt: end with the opening of an assistant turn.

        Raises:
            DataError: there are no messages, one is not a mapping, or the template refuses or fails on them.
        """
        if not messages:
            raise DataError("a conversation needs at least one message")
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping):
                raise DataError(f"message {index} is a {type(message).__name__}, expected a mapping")
        conversation = [{k: v for k, v in message.items() if v is not None} for message in messages]
        try:
            return self._compiled.render(
                messages=conversation,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
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

    Raises:
        CheckpointError: the template does not parse, or the entry has neither of its two forms.
    """
    path = folder / TEMPLATE_FILE
    if path.is_file():
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"), path)
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
    where = folder / "tokenizer_config.json"
    source = tokenizer_config.get("chat_template")
    if isinstance(source, list):
        try:
            named = {item["name"]: item["template"] for item in source}
        except (TypeError, KeyError):
            raise CheckpointError(f"{where}: chat_template is a list; each item needs 'name' and 'template'") from None
        source = named.get("default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise CheckpointError(f"{where}: chat_template is a {type(source).__name__}, expected a string")
    return ChatTemplate(source, where)


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
    environment.globals["strftime_now"] = _strftime_now
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


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _template_line(error: Exception) -> int | str:
    """Return the line of the template where an error comes from; Jinja2 adds it to the traceback as a frame."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return (lines[-1] if lines else None) or "?"
