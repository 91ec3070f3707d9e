"""Records on disk: JSON Lines, one conversation per line, in any format of the table `RECORD_FORMATS`.

A file is checked strictly and completely, and one error reports every bad line. A run that stops at one typo after the
other wastes an afternoon, and a line that is skipped in silence is never found.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from ..errors import DataError, did_you_mean
from ..files import atomic_write, unique_keys
from .conversations import Message, Problems, Record, check_conversation
from .formats import AUTO, RECORD_FORMATS, RecordFormat, recognize_format, record_format
from .given import given_records

__all__ = ["Message", "Record", "iter_records", "load_records", "parse_record", "save_records"]

_WRITTEN = RECORD_FORMATS["messages"]  # can hold every record; a line that no format recognizes is read as this one
_EXAMPLE = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}'


def load_records(path: str | os.PathLike[str], format: str = AUTO) -> list[Record]:
    """Read every conversation of a JSON Lines file.

    Blank lines are skipped, a byte order mark is tolerated, and keys that the format does not know are kept in
    `Record.extra`.

    Args:
        format: a name in the table `RECORD_FORMATS`; "auto" takes the format of the first line that fits one.

    Raises:
        ConfigError: there is no such format.
        DataError: the file is missing or holds no record, or a line is bad. One error reports all bad lines, each as
            "file:line: what is wrong" (the first 20, then how many more).
    """
    return list(iter_records(path, format))


def iter_records(path: str | os.PathLike[str], format: str = AUTO) -> Iterator[Record]:
    """Yield the good records of a JSON Lines file one by one, without holding the whole file in memory.

    Raises:
        ConfigError: there is no such format.
        DataError: as `load_records`, after the last line; a loop that stops early does not see bad lines after it.
    """
    chosen = record_format(format)
    file_path = _existing_file(Path(path))
    problems = Problems()
    found = 0
    try:
        with open(file_path, "rb") as file:  # bytes: only "\n" ends a line, and bad UTF-8 spoils one line only
            for number, raw in enumerate(file, start=1):
                raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                if not raw.strip():
                    continue
                found += 1
                source = f"{file_path.name}:{number}"
                try:
                    value = _parse_json(raw, source)
                    chosen = chosen or recognize_format(value)
                    record = _record_of(value, source, chosen or _WRITTEN)
                except DataError as problem:
                    problems.add(problem)
                else:
                    yield record
    except OSError as error:
        raise DataError(f"cannot read {file_path}: {error.strerror or error}") from error
    problems.raise_if_any()
    if not found:
        raise DataError(f"{file_path} is empty; expected one conversation per line, such as {_EXAMPLE}")


def parse_record(line: str | bytes, source: str, format: str = AUTO) -> Record:
    """Return the conversation of one line of JSON.

    Args:
        source: the line's name in errors and in the record, such as "train.jsonl:17".

    Raises:
        ConfigError: there is no such format.
        DataError: the line is not JSON, repeats a key in one object, or is not a conversation to learn from.
    """
    chosen = record_format(format)
    value = _parse_json(line.encode("utf-8", "surrogatepass") if isinstance(line, str) else line, source)
    return _record_of(value, source, chosen or recognize_format(value) or _WRITTEN)


def save_records(path: str | os.PathLike[str], records: Iterable[Record | Mapping[str, Any]]) -> None:
    """Write conversations as JSON Lines in UTF-8, in the format "messages", whole or not at all.

    Each line is parsed again before it counts, so a saved file can be loaded.

    Raises:
        DataError: a record is not a valid conversation or its `extra` is not JSON; `path` is as it was.
        StorageError: the file cannot be written; `path` is as it was.
    """
    with atomic_write(path) as part, open(part, "w", encoding="utf-8", newline="\n") as file:
        for record in given_records(records):
            file.write(_line_of(record) + "\n")


def _line_of(record: Record) -> str:
    if "messages" in record.extra:
        raise DataError(f'{record.source}: extra holds the key "messages", which is the conversation\'s own')
    try:
        line = json.dumps({"messages": record.as_dicts(), **record.extra}, ensure_ascii=False, allow_nan=False)
        line.encode("utf-8")  # a lone surrogate passes through json.dumps
    except (TypeError, ValueError) as error:
        raise DataError(f"{record.source}: cannot be written as JSON: {error}") from error
    parse_record(line, record.source, "messages")
    return line


def _existing_file(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        raise DataError(f"{path} is a folder; expected a JSON Lines file")
    if not path.parent.is_dir():
        raise DataError(f"there is no file {path}: its folder does not exist")
    neighbors = [file.name for file in path.parent.iterdir() if file.is_file()]
    raise DataError(f"there is no file {path}{did_you_mean(path.name, neighbors)}")


def _parse_json(line: bytes, source: str) -> Any:
    """Read one line; raise DataError where it is not valid UTF-8 or JSON."""
    try:
        return json.loads(line.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not valid UTF-8 at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{source}: not valid JSON: {error.msg} at character {error.pos + 1}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: not valid JSON: {error}") from None


def _record_of(value: Any, source: str, format: RecordFormat) -> Record:
    """Return a line's JSON value as a record; raise DataError if it is none, or holds nothing to learn from."""
    record = format.read(value, source)
    check_conversation(record)
    return record


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
