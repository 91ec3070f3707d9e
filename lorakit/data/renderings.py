"""A conversation as text, and where the assistant's turns are in it, for any chat template.

A template is a program, and nothing in its output marks the characters that the model has to write. What a chat program
does tells: before turn i it feeds the model render(messages[:i]) with the generation prompt, and the model writes the
rest of the turn. So every trained turn is the text that is asked with, then what the template writes of the answer.

Mostly one rendering of the whole conversation begins with all of these texts, and is trained on once. Some templates
change what came before when a turn is added: they drop the reasoning of earlier answers, move the system prompt to the
last question, or end the last turn alone. Then each turn has a rendering of its own.

The turn ends with the first end-of-turn token after its beginning. Since no text of a record may hold a special token
(`encode.py` sees to that), this can only be the template's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING

from ..errors import DataError, LorakitError
from ..models.chat_template import Messages, Tools
from .marks import Part, marked, parts_of, split_at_marks

if TYPE_CHECKING:
    from ..models.tokenizer.tokenizer import Tokenizer

NO_SYSTEM = "put it at the beginning of the first user message"  # advice

Span = tuple[int, int]  # characters [start, end) of a rendering


@dataclass(frozen=True, slots=True)
class Turn:
    """A trained turn in a rendering.

    Attributes:
        index: of its message.
        start: where the generation prompt ends.
        end: where the end-of-turn token ends.
    """

    index: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Rendering:
    """One text that the model is trained on.

    Attributes:
        text: the text.
        turns: the trained turns in it.
        count: the number of messages that it shows.
        is_joined: whether it is the text that the last turn is asked with, and the last turn behind it, because the
            template renders the whole otherwise.
    """

    text: str
    turns: tuple[Turn, ...]
    count: int
    is_joined: bool = False


class Conversation:
    """A conversation's renderings, also of its beginnings, and with marks in place of its texts.

    Args:
        tok: the tokenizer with the chat template.
        messages: the conversation.
        tools: the functions that it may call.
    """

    def __init__(self, tok: Tokenizer, messages: Messages, tools: Tools | None) -> None:
        self.tok, self.messages, self.tools = tok, messages, tools
        self._rendered: dict[tuple[int, bool, int | None], str | None] = {}

    @cached_property
    def parts(self) -> list[Part]:
        """What the record says, each text with its mark."""
        return parts_of(self.messages, self.tools)

    @cached_property
    def _marked(self) -> tuple[Messages, Tools | None]:
        return marked(self.messages, self.tools, self.parts)

    def text(self, count: int, asks: bool = False) -> str:
        """Render the first `count` messages, with the generation prompt if it `asks`.

        Raises:
            DataError: the template refuses them.
        """
        return self.tok.render_chat(self.messages[:count], asks, self.tools)

    def attempt(self, count: int, asks: bool = False, marks: int | None = None) -> str | None:
        """Render as `text`; None where the template refuses, as many do with an unfinished or an empty conversation.

        Args:
            marks: how many messages to render with marks in place of their texts, and the tools too; None: not even
                the tools.
        """
        key = (count, asks, marks)
        if key not in self._rendered:
            messages, tools = (self.messages, self.tools) if marks is None else self._marked
            shown = [*messages[: marks or 0], *self.messages[marks or 0 : count]]
            try:
                self._rendered[key] = self.tok.render_chat(shown, asks, tools)
            except LorakitError:
                self._rendered[key] = None
        return self._rendered[key]

    def renderings(self) -> list[Rendering]:
        """Return the texts to train on: one for the whole conversation if it will do, or one for each turn.

        Raises:
            DataError: the template refuses the conversation, the model would be asked with another text than it is
                trained on, or a turn has no end.
        """
        whole = self._whole()
        indices = [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]
        each = [self._rendering_of(index) for index in indices]
        turns = tuple(turn for rendering in each for turn in rendering.turns)
        if all(whole.startswith(one.text[: one.turns[0].end]) for one in each):
            return [Rendering(whole, turns, len(self.messages))]
        return each

    def _whole(self) -> str:
        try:
            return self.text(len(self.messages))
        except DataError as error:
            rest = [message for message in self.messages if message["role"] != "system"]
            without_system = Conversation(self.tok, rest, self.tools)
            if len(rest) == len(self.messages) or without_system.attempt(len(rest)) is None:
                raise
            raise DataError(f"{error}; it takes them without the system message: {NO_SYSTEM}") from None

    def _rendering_of(self, index: int) -> Rendering:
        """Return the text that turn `index` is asked with, and the turn."""
        given, asked = self.text(index + 1), self.attempt(index, asks=True)
        if asked is None:  # such as before a conversation that the assistant opens
            return self._ended(given, self._start_of_content(index, given), index)
        if given.startswith(asked):
            start = len(asked)
            if asked == self.attempt(index):
                # This template has no generation prompt. Either its user turns end with one ("[/INST]"), or it would
                # leave the header to the model, and a header is no content to learn.
                content = self._start_of_content(index, given)
                start = content if given[start:content].strip() else start
            return self._ended(given, start, index)
        opening, turn = self._after_last_mark(index, index, asks=True), self._after_last_mark(index + 1, index)
        if opening is None or turn is None or opening[1] != turn[1] or not turn[0].startswith(opening[0]):
            raise DataError(
                f"message {index + 1}: the model is asked for this answer after {asked[-30:]!r}, but the chat template "
                f"renders the answered conversation with {_where_it_differs(given, asked)!r} there, so training would "
                f"teach what is never asked; change chat_template in {self.tok.folder} so that both begin alike"
            )
        return self._ended(asked + turn[0][len(opening[0]) :], len(asked), index, is_joined=True)

    def _start_of_content(self, index: int, given: str) -> int:
        """Return where the header of turn `index` ends in `given`, the conversation up to it."""
        turn, header = self._after_last_mark(index + 1, index), self._header(index)
        if turn is not None and header is not None:
            (rest, before), (opening, before_header) = turn, header
            if before == before_header and rest.startswith(opening) and given.endswith(rest):
                return len(given) - len(rest) + len(opening)
        raise DataError(
            f"message {index + 1}: cannot tell where this assistant turn is in the rendered conversation: the chat "
            "template changes the text around it, depending on the messages"
        )

    def _header(self, index: int) -> tuple[str, int | None] | None:
        """Return what comes before an answer in plain words at `index`, and the number of the mark before that."""
        messages, tools = self._marked
        plain = Part(len(self.parts), index, (), "", "", "")  # not the turn itself: a call's opening is no header
        try:
            skeleton = self.tok.render_chat(
                [*messages[:index], {"role": "assistant", "content": plain.mark}], tools=tools
            )
        except LorakitError:
            return None
        literals, numbers = split_at_marks(skeleton)
        if plain.number not in numbers:
            return None
        place = numbers.index(plain.number)
        return literals[place], numbers[place - 1] if place else None

    def _after_last_mark(self, count: int, marks: int, asks: bool = False) -> tuple[str, int | None] | None:
        """Return what a rendering has after its last mark, and the mark's number."""
        skeleton = self.attempt(count, asks, marks)
        if skeleton is None:
            return None
        literals, numbers = split_at_marks(skeleton)
        return literals[-1], numbers[-1] if numbers else None

    def _ended(self, text: str, start: int, index: int, is_joined: bool = False) -> Rendering:
        endings = [self.tok.decode([token], skip_special_tokens=False) for token in self.tok.eos_ids]
        ends = [position + len(ending) for ending in endings if (position := text.find(ending, start)) >= 0]
        if not ends:
            tail = text[max(start, len(text) - 20) :]
            raise DataError(
                f"message {index + 1}: the chat template ends this assistant turn with {tail!r}, "
                f"without an end-of-turn token ({', '.join(endings)}), so the model would never learn to stop; check "
                "eos_token_id"
            )
        return Rendering(text, (Turn(index, start, min(ends)),), index + 1, is_joined)


def shared_length(text: str, other: str) -> int:
    """Return the number of characters with which both texts begin."""
    if text.startswith(other):  # mostly, and faster
        return len(other)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, other, strict=False)))


def _where_it_differs(text: str, other: str) -> str:
    """Return the stretch of `text` around the first character that `other` does not share."""
    first = shared_length(text, other)
    return text[max(0, first - 15) : first + 15]
