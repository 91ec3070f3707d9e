"""The record formats that training data may come in, one file and one line in a table each."""

from __future__ import annotations

from ...errors import ConfigError, did_you_mean
from .messages import MESSAGES
from .record_format import RecordFormat

__all__ = ["AUTO", "RECORD_FORMATS", "RecordFormat", "recognize_format", "record_format"]

AUTO = "auto"  # in place of a name: the records themselves tell the format

RECORD_FORMATS: dict[str, RecordFormat] = {  # if a record fits several, the first one reads it
    "messages": MESSAGES,
}


def record_format(name: str) -> RecordFormat | None:
    """Return the format with a name; None for "auto".

    Raises:
        ConfigError: there is no such format.
    """
    if name != AUTO and name not in RECORD_FORMATS:
        known = [AUTO, *RECORD_FORMATS]
        raise ConfigError(f"unknown record format '{name}'{did_you_mean(name, known)} (known: {', '.join(known)})")
    return RECORD_FORMATS.get(name)


def recognize_format(value: object) -> RecordFormat | None:
    """Return the first format in the table that recognizes a JSON value as its own, or None."""
    return next((known for known in RECORD_FORMATS.values() if known.recognizes(value)), None)
