"""Formatting of numbers, times and texts for the report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..evaluation.gate import format_score

MOST_CHARACTERS = 1500  # of one text in the report; a run's predictions.jsonl has all of it


def duration(seconds: float) -> str:
    """Format a duration: "0.8 s", "41 s", "12 min 5 s", "1 h 3 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def shorten(text: str) -> str:
    """Cut a text after `MOST_CHARACTERS` and say how much is missing."""
    text = text.encode("utf-8", "replace").decode()  # JSON can hold half a surrogate pair, which UTF-8 cannot
    left_out = len(text) - MOST_CHARACTERS
    return text if left_out <= 0 else f"{text[:MOST_CHARACTERS]} […{left_out:,} more characters]"


def fenced(text: str) -> str:
    """Return `text` as a Markdown code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def inline(text: object) -> str:
    """Escape Markdown's markup for running text or a table cell."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", re.sub(r"\s+", " ", str(text)))


def signed(value: float, best: float) -> str:
    """Format a difference of scores with its sign, U+2212 for minus."""
    sign = "+" if value > 0 else "\u2212" if value < 0 else ""
    return sign + format_score(abs(value), best)


def number(value: Any) -> str:
    """Format a number with commas between thousands; return anything else as text."""
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def words(key: str) -> str:
    """Return a key such as "train_loss" as words for people, "Train loss"."""
    return key.replace("_", " ").capitalize()


def base_prompt_words(metrics: Mapping[str, Any]) -> str:
    """Return what the base model was given besides the record's own prompt, in words; "" for nothing."""
    given = metrics.get("base_prompt")
    if given is None:  # a run of before this was recorded
        return "instructions and worked examples"
    count = given.get("examples") or 0
    parts = ["instructions"] if given.get("instructions") else []
    parts += [f"{count} worked example{'' if count == 1 else 's'}"] if count else []
    return " and ".join(parts)


def base_heading(metrics: Mapping[str, Any]) -> str:
    """Return the heading of the base model's column."""
    return f"Base, {'strong' if base_prompt_words(metrics) else 'same'} prompt"


def base_sentence(metrics: Mapping[str, Any]) -> str:
    """Return a sentence that says which prompts the two models got."""
    if given := base_prompt_words(metrics):
        return (
            f"The base model got a strong prompt with {given}, the tuned model only the short prompt that it was "
            "trained on."
        )
    return "Both got the same short prompt, which the tuned model was trained on."
