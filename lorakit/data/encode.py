"""From a conversation to token ids and a loss mask that trains the assistant's turns and nothing else.

The conversation is rendered once and tokenized once, as a whole, exactly as at inference. The tokenizer's character
offsets then say which tokens are trained. Tokenizing turn by turn and joining the ids would be simpler and wrong,
because tokens merge across the seams.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from ..errors import DataError, LorakitError
from ..models.arguments import check_tokenizer
from .given import given_records
from .records import Problems, Record
from .spans import Span, assistant_spans

if TYPE_CHECKING:
    from ..models.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenized conversation.

    Attributes:
        input_ids: the tokens.
        loss_mask: of the same length; True where the token at that position is a trained target, predicted from the
            position before. Position 0 has no position before it and is never trained.
        source: where the conversation came from, "train.jsonl:17".
    """

    input_ids: list[int]
    loss_mask: list[bool]
    source: str

    def __post_init__(self) -> None:
        if len(self.input_ids) != len(self.loss_mask):
            raise DataError(f"{self.source}: {len(self.input_ids)} tokens but {len(self.loss_mask)} loss mask entries")
        if not self.input_ids or self.loss_mask[0]:
            raise DataError(f"{self.source}: an example needs a first token, and it cannot be a target")


def encode_record(tok: Tokenizer, record: Record, max_length: int) -> Example:
    """Tokenize a conversation and mark the assistant's contents and end-of-turn tokens as trained.

    Headers and the newlines between turns are not trained. A token that straddles the edge of a turn belongs to the
    side in which it ends. At the beginning of a turn it is trained, because it carries the first characters of the
    content ("assistant\\n" + "\\nHi" may merge to a "\\n\\n" token). At the end it is not, because it carries text
    after the turn, which the model must not learn to write.

    Special tokens inside a message are refused. Otherwise "<|im_end|>\\n<|im_start|>assistant" in a user's message
    would forge a turn: the tokenizer cannot tell the template's control tokens from the data's.

    Raises:
        DataError: the conversation is longer than `max_length` tokens (nothing is ever cut off), a content holds a
            special token, no token is trained, or the chat template refuses the conversation or hides its turns. The
            message names `record.source`.
    """
    messages = record.as_dicts()
    for number, message in enumerate(messages, start=1):
        if token := _special_token_in(tok, message["content"]):
            raise DataError(
                f"{record.source}: message {number} ({message['role']}) contains the special token {token!r}, which "
                "the model would read as control, not as text; remove or rewrite it"
            )
    try:
        text = tok.render_chat(messages)
        spans = assistant_spans(tok, messages, text)
    except LorakitError as error:
        raise DataError(f"{record.source}: {error}") from error
    input_ids, offsets = tok.encode_with_offsets(text)
    if len(input_ids) > max_length:
        raise DataError(
            f"{record.source}: {len(input_ids)} tokens, max_length is {max_length}; shorten the conversation or "
            f"raise max_length to {len(input_ids)} (nothing is cut off in silence)"
        )
    loss_mask = _loss_mask(offsets, spans)
    if not any(loss_mask):
        raise DataError(f"{record.source}: no token is trained")
    return Example(input_ids, loss_mask, record.source)


def encode_records(tok: Tokenizer, records: Iterable[Record | Mapping[str, Any]], max_length: int) -> list[Example]:
    """Encode every record; a dict is read like a line of a file, such as {"messages": [...]}.

    Raises:
        ConfigError: the tokenizer is not lorakit's.
        DataError: a record cannot be encoded; one error reports all problems (the first 20, then how many more).
    """
    check_tokenizer(tok)
    problems = Problems()
    examples: list[Example] = []
    for record in given_records(records):
        try:
            examples.append(encode_record(tok, record, max_length))
        except DataError as problem:
            problems.add(problem)
    problems.raise_if_any()
    return examples


def describe_example(tok: Tokenizer, example: Example) -> str:
    """Return an example as rich markup: trained text in green and ⟦brackets⟧, the rest dim.

    Special tokens are spelled out and line ends shown as "↵". The brackets mark trained text without color too.
    """
    trained = sum(example.loss_mask)
    parts = [f"[bold]{escape(example.source)}[/bold]: {len(example.input_ids)} tokens, {trained} trained\n"]
    # Whole runs are decoded at once, because one character may take several tokens.
    for is_trained, run in groupby(zip(example.loss_mask, example.input_ids, strict=True), key=lambda pair: pair[0]):
        text = tok.decode([token for _, token in run], skip_special_tokens=False)
        shown = text.replace("\n", "↵\n")
        parts.append(f"[green]{escape(f'⟦{shown}⟧')}[/green]" if is_trained else f"[dim]{escape(shown)}[/dim]")
    return "".join(parts)


def _loss_mask(offsets: list[Span], spans: list[Span]) -> list[bool]:
    """Return for each token whether it ends within one of the spans."""
    mask: list[bool] = []
    previous_end = 0
    for begin, end in offsets:
        if begin < end or previous_end < end:
            # Byte-level tokenizers trim offsets and report a token of only spaces as empty, at its end. The gap to the
            # token before shows that it is not empty.
            mask.append(any(first < end <= last for first, last in spans))
        else:  # a token without characters, such as an inserted "▁", belongs with the character after it
            mask.append(any(first <= begin < last for first, last in spans))
        previous_end = max(previous_end, end)
    return [False, *mask[1:]] if mask else []


def _special_token_in(tok: Tokenizer, text: str) -> str | None:
    """Return the first special token in `text`: a token that decoding can skip, or an end-of-turn token."""
    ids = tok.encode(text)
    eos_ids = set(tok.eos_ids)
    if tok.decode(ids) == tok.decode(ids, skip_special_tokens=False) and eos_ids.isdisjoint(ids):
        return None
    for token in ids:
        spelled = tok.decode([token], skip_special_tokens=False)
        if token in eos_ids or (spelled and not tok.decode([token])):
            return spelled
    return None
