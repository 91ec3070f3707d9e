"""From a conversation to token ids and a loss mask that trains the assistant's turns and nothing else.

A rendering (`renderings.py`) is tokenized as a whole, exactly as at inference. The tokenizer's character offsets say
where a turn begins, and its first end-of-turn token is where it ends. Tokenizing turn by turn and joining the ids
would be simpler and wrong, because tokens merge across the seams.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from ..errors import DataError, LorakitError
from ..models.arguments import check_tokenizer
from .conversations import Problems, Record, texts_in
from .given import given_records
from .left_out import check_nothing_left_out
from .renderings import Conversation, Rendering, Span

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
        lengths: tokens of each rendering. Mostly there is one; a chat template that changes earlier turns when another
            is added gives one for each trained turn, end to end.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    source: str
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(self.lengths) or (len(self.input_ids),))
        if len(self.input_ids) != len(self.loss_mask):
            raise DataError(f"{self.source}: {len(self.input_ids)} tokens but {len(self.loss_mask)} loss mask entries")
        if sum(self.lengths) != len(self.input_ids):
            raise DataError(f"{self.source}: {len(self.input_ids)} tokens in renderings of {list(self.lengths)}")
        if 0 in self.lengths or any(self.loss_mask[first] for first, _ in self.bounds()):
            raise DataError(f"{self.source}: an example needs a first token, and it cannot be a target")

    def bounds(self) -> list[tuple[int, int]]:
        """Return where each rendering begins and ends in the tokens."""
        return list(pairwise(accumulate(self.lengths, initial=0)))


def encode_record(tok: Tokenizer, record: Record, max_length: int) -> Example:
    """Tokenize a conversation and mark the assistant's contents and end-of-turn tokens as trained.

    Headers and the newlines between turns are not trained. A token that straddles the beginning of a turn is trained,
    because it carries the first characters of the content ("assistant\\n" + "\\nHi" may merge to a "\\n\\n" token). A
    turn ends with the end-of-turn token, whatever white space the tokenizer drops beside it.

    Special tokens inside a message are refused. Otherwise "<|im_end|>\\n<|im_start|>assistant" in a user's message
    would forge a turn: the tokenizer cannot tell the template's control tokens from the data's.

    Raises:
        DataError: the conversation is longer than `max_length` tokens (nothing is ever cut off), a text holds a special
            token, no token is trained, or the chat template refuses the conversation, leaves out some of it, or renders
            it otherwise than it asks. The message names `record.source`.
    """
    _check_special_tokens(tok, record)
    conversation = Conversation(tok, record.as_dicts(), record.tools)
    input_ids: list[int] = []
    loss_mask: list[bool] = []
    lengths = []
    try:
        renderings = conversation.renderings()
        check_nothing_left_out(conversation, renderings)
        for rendering in renderings:
            ids, offsets = tok.encode_with_offsets(rendering.text)
            input_ids += ids
            loss_mask += _loss_mask(ids, offsets, rendering, tok.eos_ids)
            lengths.append(len(ids))
    except LorakitError as error:
        raise DataError(f"{record.source}: {error}") from error
    if max(lengths) > max_length:
        raise DataError(
            f"{record.source}: {max(lengths)} tokens, max_length is {max_length}; shorten the conversation or "
            f"raise max_length to {max(lengths)} (nothing is cut off in silence)"
        )
    if not any(loss_mask):
        raise DataError(f"{record.source}: no token is trained")
    return Example(input_ids, loss_mask, record.source, tuple(lengths))


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
    Several renderings are numbered.
    """
    trained = sum(example.loss_mask)
    parts = [f"[bold]{escape(example.source)}[/bold]: {len(example.input_ids)} tokens, {trained} trained\n"]
    for number, (first, last) in enumerate(example.bounds(), start=1):
        if len(example.lengths) > 1:
            parts.append(f"[bold]rendering {number} of {len(example.lengths)}[/bold]\n")
        pairs = zip(example.loss_mask[first:last], example.input_ids[first:last], strict=True)
        # Whole runs are decoded at once, because one character may take several tokens.
        for is_trained, run in groupby(pairs, key=lambda pair: pair[0]):
            text = tok.decode([token for _, token in run], skip_special_tokens=False)
            shown = text.replace("\n", "↵\n")
            parts.append(f"[green]{escape(f'⟦{shown}⟧')}[/green]" if is_trained else f"[dim]{escape(shown)}[/dim]")
    return "".join(parts)


def _loss_mask(ids: list[int], offsets: list[Span], rendering: Rendering, eos_ids: Sequence[int]) -> list[bool]:
    """Return for each token whether it is trained: from the first that ends in a turn to the turn's end-of-turn token.

    Raises:
        DataError: the tokenizer merges the end of a turn with what follows.
    """
    places = _places(offsets)
    mask = [False] * len(ids)
    for turn in rendering.turns:
        first, beyond = bisect_right(places, turn.start), bisect_right(places, turn.end)
        last = next((place for place in range(first, beyond) if ids[place] in eos_ids), None)
        if last is None:
            raise DataError(
                f"message {turn.index + 1}: the tokenizer has no token of its own for the end of this turn, "
                f"{rendering.text[turn.end - 10 : turn.end + 10]!r}, so the model would never learn to stop"
            )
        mask[max(first, 1) : last + 1] = [True] * (last + 1 - max(first, 1))
    return mask


def _places(offsets: list[Span]) -> list[float]:
    """Return for each token the place in the text by which it belongs to a turn: the end of its characters."""
    places: list[float] = []
    previous_end = 0
    for begin, end in offsets:
        if begin < end or previous_end < end:
            # Byte-level tokenizers trim offsets and report a token of only spaces as empty, at its end. The gap to the
            # token before shows that it is not empty.
            places.append(end)
        else:  # a token without characters, such as an inserted "▁", belongs with the character after it
            places.append(begin + 0.5)
        previous_end = max(previous_end, end)
    return list(accumulate(places, max))


def _check_special_tokens(tok: Tokenizer, record: Record) -> None:
    """Raise DataError if a text of the record holds a special token."""
    places = [
        (f"message {number} ({message.role})", [message.content, *texts_in(message.extra)])
        for number, message in enumerate(record.messages, start=1)
    ]
    for where, texts in [*places, ('"tools"', list(texts_in(record.tools)))]:
        for text in texts:
            if token := _special_token_in(tok, text):
                raise DataError(
                    f"{record.source}: {where} contains the special token {token!r}, which the model would read as "
                    "control, not as text; remove or rewrite it"
                )


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
