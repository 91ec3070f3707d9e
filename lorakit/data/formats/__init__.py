"""The record formats that training data may come in, one file and one line in a table each."""

from __future__ import annotations

from ...errors import ConfigError, did_you_mean
from .messages import MESSAGES
from .record_format import RecordFormat

__all__ = ["AUTO", "RECORD_FORMATS", "RecordFormat", "recognize_format", "record_format"]

AUTO = "auto"  # in place of a name: the format is told by the records themselves

RECORD_FORMATS: dict[str, RecordFormat] = {  # where a record fits several, the first has it
    "messages": MESSAGES,
}


def record_format(name: str) -> RecordFormat | None:
    """Return the format of a name, None for "auto".

    Raises:
        ConfigError: there is no such format.
    """
    if name != AUTO and name not in RECORD_FORMATS:
        known = [AUTO, *RECORD_FORMATS]
        raise ConfigError(f"unknown record format '{name}'{did_you_mean(name, known)} (known: {', '.join(known)})")
    return RECORD_FORMATS.get(name)


def recognize_format(value: object) -> RecordFormat | None:
    """Return the first format of the table that takes a JSON value for a record of its own; None where none does."""
    return next((known for known in RECORD_FORMATS.values() if known.recognizes(value)), None)
