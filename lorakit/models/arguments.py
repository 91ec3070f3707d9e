"""Checks of the model and the tokenizer that a function is given, with errors that say what to use instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError, DataError

# By what they can do, not by their class: a wrapped or compiled decoder is as good.
_DECODER, _TOKENIZER = "hidden_states", "render_chat"


def check_decoder(model: object, what: str) -> None:
    """Raise ConfigError, which names the function `what`, if a model is not lorakit's decoder."""
    if not hasattr(model, _DECODER):
        own = " (model.generate is its own way to generate)" if callable(getattr(model, "generate", None)) else ""
        name = getattr(getattr(model, "config", None), "_name_or_path", "") or "folder"
        raise ConfigError(
            f"{what} takes a lorakit Decoder, not a {type(model).__name__}{own}: load it with lk.load_model({name!r}); "
            "an adapter goes from one to the other with save_adapter and load_adapter"
        )


def check_tokenizer(tok: object) -> None:
    """Raise ConfigError if a tokenizer is not lorakit's."""
    if not hasattr(tok, _TOKENIZER):
        name = getattr(tok, "name_or_path", "") or "folder"
        kind = type(tok).__name__
        raise ConfigError(f"the tokenizer is a {kind}, not lorakit's: load it with lk.load_tokenizer({name!r})")


def prompts_of(inputs: Any) -> tuple[Sequence[Any], bool]:
    """Return prompts or conversations as a sequence, and whether they were one alone.

    Raises:
        DataError: something is neither a text nor a list of messages.
    """
    if isinstance(inputs, str):
        return [inputs], True
    if not isinstance(inputs, Sequence):
        _refuse_record(inputs, "the prompt")
        try:
            inputs = list(inputs)
        except TypeError:
            raise DataError(_expected("the prompt", inputs)) from None
    if inputs and isinstance(inputs[0], Mapping):
        _refuse_record(inputs[0], "prompt 0")
        return [inputs], True
    for index, item in enumerate(inputs):
        _refuse_record(item, f"prompt {index}")
        is_conversation = isinstance(item, Sequence) and all(isinstance(message, Mapping) for message in item)
        if not isinstance(item, str) and not is_conversation:
            raise DataError(_expected(f"prompt {index}", item))
    return inputs, False


def _refuse_record(item: Any, what: str) -> None:
    if isinstance(item, Mapping) and "messages" in item and "role" not in item:
        raise DataError(f'{what} is a record; a model is asked with its messages up to the answer: x["messages"][:-1]')
    if hasattr(item, "as_dicts"):
        raise DataError(f"{what} is a record; a model is asked with its messages up to the answer: x.as_dicts()[:-1]")
    if isinstance(item, Mapping) and what == "the prompt":
        raise DataError(f"{what} is one message; a conversation is a list of them: [message]")


def _expected(what: str, item: object) -> str:
    return f"{what} is a {type(item).__name__}; expected a text, or a list of messages with 'role' and 'content'"
