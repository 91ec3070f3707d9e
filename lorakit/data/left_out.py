"""What a chat template leaves out of a record, which the model would never see.

Templates leave out in silence what they were not written for: a system prompt, roles that they do not know, tools,
reasoning. Two checks find it. A mark in place of each text shows which texts reach a rendering at all; marks are all
different, so that a text which two messages share is found in neither's place. Then the rendering has to contain each
text whole, since a template may cut a text where it finds a certain word, such as "</think>".
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from ..errors import DataError, LorakitError
from .marks import Part, probed, split_at_marks
from .renderings import NO_SYSTEM, Conversation, Rendering, shared_length

# Words by which a message steers a template, which reads and removes them.
_SWITCHES = re.compile(r"/no_think|/nothink|/think|/system_override")

_TEXT_KEY = re.compile(r"""['"]text['"]: ['"]$""")

_ADVICE = {
    "system": NO_SYSTEM,
    "tools": "this model was not made for tools; take them out of the record, or describe them in a message",
    "tool": "this model was not made for tools; put the result into a user message",
    "name": "put the name into the content",
}


def check_nothing_left_out(conversation: Conversation, renderings: Sequence[Rendering]) -> None:
    """Make sure that everything a record says is in its renderings.

    An answer has to be in the rendering where it is trained, anything else in one of them: with several, later ones are
    asked without what the template drops from a longer conversation, in training as in use. What comes after the last
    trained turn of several is not rendered at all, and changes nothing.

    Raises:
        DataError: a text, or some of it, is missing; the message names it and says what to do.
    """
    shown = max(rendering.count for rendering in renderings)
    parts = [part for part in conversation.parts if part.message is None or part.message < shown]
    places = {part.number: [r for r in renderings if _has_to_show(r, part, conversation)] for part in parts}
    for part in parts:
        if not any(_reaches(conversation, rendering, part) for rendering in places[part.number]):
            raise _refusal(conversation, part, "leaves out")
    flat = {rendering: _squeezed(rendering.text) for rendering in renderings}
    for part in parts:
        if part.path[-1] == "text" and _is_code(conversation, part):
            raise _refusal(conversation, part, "writes out with brackets and keys", "give the content as a string")
        found = places[part.number]
        if _is_json(part) and not any(_squeezed(part.text) in flat[rendering] for rendering in found):
            raise _refusal(conversation, part, "puts into quotes once more", "give the arguments as an object")
        if _is_prose(part) and not any(_whole(conversation, rendering, part, flat[rendering]) for rendering in found):
            raise _refusal(conversation, part, "leaves out or changes some of")


def _is_code(conversation: Conversation, part: Part) -> bool:
    """Return whether the template writes a list of text parts as a list, with the keys of its parts."""
    assert part.message is not None
    skeleton = conversation.attempt(part.message + 1, marks=part.message + 1) or ""
    literals, numbers = split_at_marks(skeleton)
    return any(
        number == part.number and _TEXT_KEY.search(literal) for literal, number in zip(literals, numbers, strict=False)
    )


def _has_to_show(rendering: Rendering, part: Part, conversation: Conversation) -> bool:
    if part.message is None:
        return True
    if conversation.messages[part.message]["role"] == "assistant":
        return any(turn.index == part.message for turn in rendering.turns)
    return part.message < rendering.count


def _is_prose(part: Part) -> bool:
    """Whether a text is to be found as it is: calls and tools become JSON, or what a model's own syntax makes of it."""
    return part.message is not None and "tool_calls" not in part.path and part.kind != "name"


def _is_json(part: Part) -> bool:
    """Whether a text is a call's arguments, given as a string of JSON instead of an object."""
    return part.path[-1] == "arguments" and "arguments" not in part.path[:-1]


def _reaches(conversation: Conversation, rendering: Rendering, part: Part) -> bool:
    """Return whether a part's mark gets into a rendering, in a marked conversation or alone in the real one."""
    count, asks = rendering.count, False
    if rendering.is_joined and part.message != count - 1:  # all but the turn itself comes from the text that asks
        count, asks = count - 1, True
    skeleton = conversation.attempt(count, asks, marks=count)
    if skeleton is not None and part.number in split_at_marks(skeleton)[1]:
        return True
    messages, tools = probed(conversation.messages, conversation.tools, part)
    try:
        text = conversation.tok.render_chat(messages[:count], asks, tools)
    except LorakitError:
        return False
    return part.number in split_at_marks(text)[1]


def _whole(conversation: Conversation, rendering: Rendering, part: Part, flat: str) -> bool:
    """Return whether a rendering contains a part's text, apart from white space, escapes and a template's switches.

    Args:
        flat: the rendering without its white space.
    """
    assert part.message is not None
    wanted = 1
    for turn in rendering.turns:
        if turn.index == part.message:  # only the turn counts, from its header on: others may say the same
            begin = shared_length(rendering.text, conversation.attempt(turn.index) or "")
            flat = _squeezed(rendering.text[begin : turn.end])
            break
    else:
        roles = [message["role"] for message in conversation.messages]
        wanted = sum(
            other.text == part.text and other.message is not None and roles[other.message] != "assistant"
            for other in conversation.parts
            if other.message is None or other.message < rendering.count
        )
    forms = {_squeezed(form) for form in _forms(part.text)}
    return "" in forms or sum(flat.count(form) for form in forms) >= wanted


def _forms(text: str) -> list[str]:
    """Return a text in the forms that templates give to it."""
    return [text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1], _SWITCHES.sub("", text)]


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _refusal(conversation: Conversation, part: Part, verb: str, advice: str | None = None) -> DataError:
    where = "" if part.message is None else f"message {part.message + 1}: "
    advice = advice or _ADVICE.get(part.kind, "change the record")
    return DataError(
        f"{where}the chat template {verb} {part.what} ({_shortened(part.text)!r}), so the model would not see what the "
        f"record says; {advice}, or change chat_template in {conversation.tok.folder}"
    )


def _shortened(text: str, width: int = 40) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
