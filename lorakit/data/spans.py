"""Where the assistant's turns are in a rendered conversation, for any chat template.

A template is a program, and nothing in its output marks the characters that the model has to write. Two facts find them
without knowing the template.

1. The generation prompt. Before turn i, a chat program feeds the model render(messages[:i]) with the generation prompt.
   If the whole conversation begins with exactly that text, the turn begins where the text ends.
2. The skeleton. Render the conversation again with each content replaced by a marker. The text between the markers is
   the template's own. Fitted over the real rendering, it locates each content to the character. This serves templates
   that render an unfinished conversation differently: they open a reasoning block in the generation prompt, move the
   system message, or have no generation prompt.

The turn ends with the first end-of-turn token after its beginning. Since no content may hold a special token
(`encode.py` sees to that), this can only be the template's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import DataError, LorakitError

if TYPE_CHECKING:
    from ..models.tokenizer.tokenizer import Tokenizer

Span = tuple[int, int]  # characters [start, end) of the rendered conversation
Messages = Sequence[Mapping[str, str]]

_MARK = re.compile("\ue000([0-9]+)\ue001")  # private-use characters: no template tests for them or strips them

# How templates change a content, most frequent first; the first that fits the skeleton is taken.
_RENDERED_FORMS: tuple[Callable[[str], str], ...] = (
    lambda content: content,
    str.strip,
    str.lstrip,
    str.rstrip,
    lambda content: content.strip("\n"),
    lambda content: content.lstrip("\n"),
)


def assistant_spans(tok: Tokenizer, messages: Messages, rendered: str) -> list[Span]:
    """Return the spans of the assistant's turns in `rendered` = tok.render_chat(messages), in order.

    A span begins where the generation prompt ends (after the header, and after the spaces that belong to it) and ends
    with the end-of-turn token, without the newline that templates put after it.

    Raises:
        DataError: the template leaves the turns' beginnings or ends undecidable; the message says which and why.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    located = _locate_contents(tok, messages, rendered)
    starts = [_turn_start(tok, messages, index, rendered, located) for index in turns]
    limits = [*starts[1:], len(rendered)]
    endings = [tok.decode([token], skip_special_tokens=False) for token in tok.eos_ids]
    spans: list[Span] = []
    for index, start, limit in zip(turns, starts, limits, strict=True):
        rendered_so_far = _try_render(tok, messages[: index + 1])
        if rendered_so_far is not None and rendered.startswith(rendered_so_far):
            limit = min(limit, len(rendered_so_far))
        ends = [position + len(text) for text in endings if (position := rendered.find(text, start, limit)) >= 0]
        if not ends:
            tail = rendered[max(start, limit - 20) : limit]
            raise DataError(
                f"message {index + 1}: the chat template ends this assistant turn with {tail!r}, without an "
                f"end-of-turn token ({', '.join(endings)}), so the model would never learn to stop; check eos_token_id"
            )
        spans.append((start, min(ends)))
    return spans


def _turn_start(
    tok: Tokenizer, messages: Messages, index: int, rendered: str, located: Mapping[int, Span] | None
) -> int:
    prompt = _try_render(tok, messages[:index], add_generation_prompt=True)
    if prompt is not None and rendered.startswith(prompt):
        start = len(prompt)
        if prompt != _try_render(tok, messages[:index]):
            return start
        # This template has no generation prompt. Either its user turns end with one ("[/INST]"), or it would leave the
        # header to the model, and a header is no content to learn.
        if located is not None and not rendered[start : located[index][0]].strip():
            return start
    if located is None:
        raise DataError(
            f"message {index + 1}: cannot tell where this assistant turn is in the rendered conversation: the chat "
            "template renders the conversation up to it differently than as part of the whole, and changes contents by "
            "more than stripping whitespace"
        )
    return located[index][0]


def _locate_contents(tok: Tokenizer, messages: Messages, rendered: str) -> dict[int, Span] | None:
    """Return the spans of the assistant's contents by message index, or None if the skeleton does not fit."""
    marked = [{**message, "content": f"\ue000{index}\ue001"} for index, message in enumerate(messages)]
    skeleton = _try_render(tok, marked)
    if skeleton is None:
        return None
    literal, *rest = _MARK.split(skeleton)  # literal, index, literal, index, literal, ...
    if not rendered.startswith(literal):
        return None
    position = len(literal)
    found: dict[int, Span] = {}
    for index, following in zip(map(int, rest[::2]), rest[1::2], strict=True):
        content = messages[index]["content"]
        for form in _RENDERED_FORMS:
            end = position + len(form(content))
            if rendered.startswith(form(content) + following, position):
                break
        else:
            return None
        if index in found:
            return None  # rendered twice: ambiguous
        if messages[index]["role"] == "assistant":
            found[index] = (position, end)
        position = end + len(following)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return found if position == len(rendered) and list(found) == turns else None


def _try_render(tok: Tokenizer, messages: Messages, add_generation_prompt: bool = False) -> str | None:
    """Render, or return None where the template refuses (many do for an unfinished or an empty conversation)."""
    try:
        return tok.render_chat(messages, add_generation_prompt=add_generation_prompt)
    except LorakitError:
        return None
