"""Reading a model's output as JSON as strictly as the program that will consume it.

The whole output, stripped of surrounding whitespace, must be exactly one JSON value. A code fence or other text around
it is an error. NaN and Infinity are not JSON. An object that repeats a key is refused: RFC 8259 leaves its meaning
open, and two programs may read two different values from it.
"""

from __future__ import annotations

import json
from typing import Any

from ..files import unique_keys


def parse_json(text: str) -> Any:
    """Read `text`, stripped, as exactly one JSON value.

    Raises:
        ValueError: it is not: anything before or after, NaN or Infinity, a repeated key, nesting too deep to read.
    """
    try:
        return json.loads(text.strip(), parse_constant=_refuse_constant, object_pairs_hook=unique_keys)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def same_json(first: Any, second: Any) -> bool:
    """Return whether two JSON values are equal by JSON Schema's rule: 1 equals 1.0, but unlike in Python not true."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same_json(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(same_json, first, second))
    return bool(first == second)


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
