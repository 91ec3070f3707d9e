"""`RecordFormat`, an entry of the table of record formats, and the wording that all formats share.

A new format is one file with a `RecordFormat` and one line in the table `RECORD_FORMATS`. `lorakit/data/records.py`
reads files, names bad lines and checks conversations for all formats alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import DataError, did_you_mean
from ..conversations import Record


@dataclass(frozen=True)
class RecordFormat:
    """A way to write a conversation as one JSON object.

    Attributes:
        keys: the keys that every object of this format has; they identify the format.
        parse: (object, source) -> the record, with the object's other keys in `extra`. The keys above are present. It
            raises `DataError`, with `source` in front, if a value is wrong. It need not check the conversation.
        aliases: another name of a key, in lower case -> the key, for hints.
    """

    keys: tuple[str, ...]
    parse: Callable[[dict[str, Any], str], Record]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def recognizes(self, value: object) -> bool:
        """Return whether a JSON value has the keys of this format."""
        return isinstance(value, dict) and all(key in value for key in self.keys)

    def read(self, value: object, source: str) -> Record:
        """Return a JSON value as a record.

        Raises:
            DataError: the value is not a record of this format.
        """
        if not isinstance(value, dict):
            keys = " and ".join(f'"{key}"' for key in self.keys)
            raise DataError(f"{source}: expected an object with {keys}, found {json_type(value)}")
        for key in self.keys:
            if key not in value:
                raise DataError(f'{source}: the key "{key}" is missing{found_instead(value, key, self.aliases)}')
        return self.parse(dict(value), source)


def found_instead(value: Mapping[str, Any], wanted: str, aliases: Mapping[str, str]) -> str:
    """Name the keys that are present, and the one that was probably meant to be `wanted`.

    Args:
        aliases: another name of a key, in lower case -> the key.
    """
    if not value:
        return "; the object is empty"
    keys = ", ".join(f'"{key}"' for key in list(value)[:8])
    for key in value:
        if aliases.get(key.casefold()) == wanted or did_you_mean(key.casefold(), [wanted]):
            return f"; found {keys}; did you mean '{wanted}' where it says '{key}'?"
    return f"; found {keys}"


def json_type(value: Any) -> str:
    """Return the JSON name of a value's type, for error messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
