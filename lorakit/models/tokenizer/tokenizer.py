"""A checkpoint's tokenizer: text to token ids and back, with offsets, and conversations to text.

The `tokenizers` package reads tokenizer.json and does the work. Around it, this file brings together what three JSON
files say about special tokens: tokenizer_config.json names them, generation_config.json and config.json say which
tokens end a generation.
"""

from __future__ import annotations

import copy
import datetime
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import tokenizers

from ...errors import CheckpointError, DataError
from ...files import read_json_object
from ..chat_template import ChatMessages, ChatTemplate, Messages, Tools, find_chat_template, today
from ..pretrained import resolve_model

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Text to token ids and back, and conversations to text.

    Attributes:
        eos_token: the text of the token that ends a turn or a document.
        eos_id: its id.
        eos_ids: every id that ends a generation.
        pad_id: the padding token's id, or the eos token's if there is none.
        special_tokens: name -> text, from tokenizer_config.json, as chat templates see them.
        folder: where the tokenizer was loaded from, or None.
        date: the date that templates which ask for today's get. It stays the same for as long as the tokenizer lives,
            so that training, resuming and asking see one text.
        has_own_date: whether whoever loaded it chose the date.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_ids: Sequence[int],
        special_tokens: Mapping[str, str] | None = None,
        template: ChatTemplate | None = None,
        folder: Path | None = None,
        date: datetime.date | None = None,
    ) -> None:
        self._backend = backend
        # A tokenizer.json may carry the truncation and padding of whoever saved it; both would change ids silently.
        backend.no_truncation()
        backend.no_padding()
        self._template = template
        self.folder = folder
        self.date, self.has_own_date = date or today(), date is not None
        # A token with lstrip or rstrip takes the whitespace beside it into its span.
        added = backend.get_added_tokens_decoder()
        self._stripping = {i: token.content for i, token in added.items() if token.lstrip or token.rstrip}
        self.special_tokens = dict(special_tokens or {})
        self.eos_ids = tuple(eos_ids)
        eos_token = self.special_tokens.get("eos_token")
        self.eos_id = self.eos_ids[0] if eos_token is None else self._id(eos_token, "eos_token")
        self.eos_token = str(backend.id_to_token(self.eos_id))
        pad_token = self.special_tokens.get("pad_token")
        self.pad_id = self.eos_id if pad_token is None else self._id(pad_token, "pad_token")

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including added ones."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def prefix_ids(self) -> tuple[int, ...]:
        """The tokens that tokenizer.json's post-processor puts before every text, such as BOS."""
        probe = self._encoding(self.eos_token, add_special_tokens=True)  # an added token is never empty
        added = takewhile(lambda pair: pair[1] is None, zip(probe.ids, probe.sequence_ids, strict=True))
        return tuple(token for token, _ in added)

    @property
    def chat_template(self) -> str | None:
        """The template's text, or None."""
        return None if self._template is None else self._template.source

    @property
    def is_dated(self) -> bool:
        """Whether the chat template asks for the date."""
        return self._template is not None and self._template.is_dated

    def on(self, date: datetime.date) -> Tokenizer:
        """Return the same tokenizer with another date."""
        other = copy.copy(self)
        other.date, other.has_own_date = date, True
        return other

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, eos_token={self.eos_token!r}, folder={str(self.folder)!r})"

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Return the token ids of a text.

        Special tokens written out in the text, such as those of a rendered chat, always become their ids. A byte
        without a token gives none (SmolLM2 lacks six control characters and the unassigned planes 4 to 11).

        Args:
            add_special_tokens: also add what tokenizer.json's post-processor adds, such as a BOS token.

        Raises:
            DataError: the text is not a string, or holds a lone surrogate, which is not valid Unicode.
        """
        return self._encoding(text, add_special_tokens).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Return the token ids of a text that a model continues: `prefix_ids`, such as BOS, then the text's.

        A text that begins with these tokens, such as a rendered chat with its own BOS, gets no second ones. What the
        post-processor puts at the end, such as EOS, is left out, because a prompt does not end there.

        Raises:
            DataError: as `encode`.
        """
        ids, prefix = self.encode(text), self.prefix_ids
        return ids if tuple(ids[: len(prefix)]) == prefix else [*prefix, *ids]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the token ids and, for each, the span of characters of `text` that it stands for.

        A word's span includes the space before it if its token does. A character of several bytes may be split among
        tokens; the span of each then includes the whole character. A special token's span is its own text, without the
        whitespace that the tokenizer drops beside it.

        Raises:
            DataError: as `encode`.
        """
        encoding = self._encoding(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        if self._stripping:
            offsets = [self._own_span(text, *pair) for pair in zip(ids, offsets, strict=True)]
        return ids, offsets

    def _own_span(self, text: str, token_id: int, span: tuple[int, int]) -> tuple[int, int]:
        content = self._stripping.get(token_id)
        begin = -1 if content is None else text.find(content, *span)
        return span if content is None or begin < 0 else (begin, begin + len(content))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; bytes that are not valid UTF-8 become U+FFFD.

        Raises:
            DataError: an id is negative, such as the -100 of untrained targets, or not an integer.
        """
        try:
            return self._backend.decode([int(token_id) for token_id in ids], skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError, ValueError) as error:
            raise DataError(f"token ids cannot be decoded; they must be non-negative integers: {error}") from None

    def decode_after(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """Return the text of token ids that continue a prompt, so that both texts joined are the whole text.

        SentencePiece puts a space before a text and `decode` drops it. Here the space is dropped only where the
        tokenizer put it: at the beginning of the text, or after an added token.

        Args:
            prompt: from `encode_prompt`.

        Raises:
            DataError: as `decode`.
        """
        return self.decode(ids) if self._begins_after(prompt) else self._decode_inside(ids)

    def render_chat(self, messages: Messages, add_generation_prompt: bool = False, tools: Tools | None = None) -> str:
        """Return a conversation as the text the model was trained on.

        Equal to transformers' `apply_chat_template(messages, tools, tokenize=False)` on the day `date`.

        Args:
            messages: mappings with "role" and "content", and other keys that the template reads, such as "tool_calls".
            add_generation_prompt: end with the opening of an assistant turn, for the model to complete.
            tools: JSON Schemas of the functions that the conversation may call; None: those of `messages`, if they are
                `ChatMessages`.

        Raises:
            DataError: there is no chat template, there are no messages, or the template refuses or fails on them (with
                the template's file and line).
        """
        if self._template is None:
            raise DataError(
                f"{self.folder}: there is no chat template: tokenizer_config.json has no 'chat_template' (or a list "
                "without 'default') and there is no chat_template.jinja; a base model has none: use its instruct "
                "version or plain text"
            )
        if tools is None and isinstance(messages, ChatMessages):
            tools = messages.tools
        return self._template.render(messages, self.special_tokens, add_generation_prompt, tools, self.date)

    def _begins_after(self, prompt: Sequence[int]) -> bool:
        """Return whether the tokenizer treats what comes after a prompt as the beginning of a text."""
        if tuple(prompt) == self.prefix_ids:
            return True
        if prompt[-1] not in self._added_ids:
            return False
        last, *letter = self.encode(f"{self._backend.id_to_token(prompt[-1])}a")
        return last == prompt[-1] and self._decode_inside(letter) == " a"

    def _decode_inside(self, ids: Sequence[int]) -> str:
        """Return the text of token ids in the middle of a text: that of "a" and them, without the "a"."""
        before = self.encode("a")
        head, text = self.decode(before), self.decode([*before, *ids])
        return text.removeprefix(head) if text.startswith(head) else self.decode(ids)

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self._backend.get_added_tokens_decoder())

    def _encoding(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        if not isinstance(text, str):
            raise DataError(f"cannot encode a {type(text).__name__}, expected a string")
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError):
            first = next((i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff"), None)
            raise DataError(
                f"cannot encode the text: character {first} is a lone surrogate, not valid Unicode"
            ) from None

    def _id(self, token: str, name: str) -> int:
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise CheckpointError(f"{self.folder}: {name} is {token!r}, which tokenizer.json does not have")
        return token_id


def load_tokenizer(path: str | os.PathLike[str], date: datetime.date | None = None) -> Tokenizer:
    """Load the tokenizer of a checkpoint folder or of a known model (see `resolve_model`).

    Args:
        date: for chat templates that ask for today's, as Llama 3.2's does; None: today.

    A generation ends at generation_config.json's eos_token_id, else at config.json's, else at the id of
    tokenizer_config.json's eos_token.

    Raises:
        CheckpointError: tokenizer.json is missing or malformed, a JSON file beside it is malformed, the chat template
            does not parse, or a special token is unknown to tokenizer.json.
    """
    folder = resolve_model(path)
    file = folder / "tokenizer.json"
    read_json_object(file)  # for its errors, which have line and column
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers package raises plain Exception
        raise CheckpointError(f"{file}: not a tokenizer: {error}") from None
    config = _optional_json(folder / "tokenizer_config.json")
    special_tokens = _special_tokens(config, folder / "tokenizer_config.json")
    eos_ids = _eos_ids(folder, backend, special_tokens)
    template = find_chat_template(folder, config)
    return Tokenizer(
        backend, eos_ids=eos_ids, special_tokens=special_tokens, template=template, folder=folder, date=date
    )


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def _special_tokens(config: Mapping[str, Any], where: Path) -> dict[str, str]:
    """Return the named special tokens; each is a string, {"content": string, ...} or null."""
    tokens = {}
    for name in SPECIAL_TOKENS:
        value = config.get(name)
        if isinstance(value, Mapping):
            value = value.get("content", value)
        if value is not None and not isinstance(value, str):
            raise CheckpointError(f"{where}: {name} is {value!r}, expected a string or an object with 'content'")
        if value is not None:
            tokens[name] = value
    return tokens


def _eos_ids(folder: Path, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str]) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        value = _optional_json(folder / name).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        # type(...) is int: JSON's true is an int to Python. A token the model has and the tokenizer lacks is unusable.
        if not ids or not all(type(i) is int and i >= 0 and backend.id_to_token(i) is not None for i in ids):
            raise CheckpointError(f"{folder / name}: eos_token_id is {value!r}, expected ids that tokenizer.json has")
        return ids
    eos_token = special_tokens.get("eos_token")
    if eos_token is None:
        raise CheckpointError(
            f"{folder}: no eos token: neither generation_config.json nor config.json has an eos_token_id, and "
            "tokenizer_config.json no eos_token"
        )
    eos_id = backend.token_to_id(eos_token)
    if eos_id is None:
        raise CheckpointError(f"{folder}: eos_token is {eos_token!r}, which tokenizer.json does not have")
    return [eos_id]
