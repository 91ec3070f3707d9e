"""Records as a program gives them: `Record` objects, or plain dicts in one of the formats of JSON Lines files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..errors import DataError
from .conversations import Problems, Record, check_conversation
from .formats import RECORD_FORMATS, recognize_format


def given_records(records: Iterable[Record | Mapping[str, Any]]) -> Iterator[Record]:
    """Yield records; dicts are read and checked like the lines of a file, and called "records[3]" in errors.

    Raises:
        DataError: `records` is not a collection of records, or a dict is not a valid conversation. One error reports
            all bad dicts (the first 20, then how many more), after the last one.
    """
    if isinstance(records, str | os.PathLike):
        raise DataError(f"records are expected, not a path: read them with lk.load_records({str(records)!r})")
    if isinstance(records, Record | Mapping) or not isinstance(records, Iterable):
        raise DataError(f"a list of records is expected, not a {type(records).__name__}")
    problems = Problems()
    for index, item in enumerate(records):
        if isinstance(item, Record):
            yield item
            continue
        source = f"records[{index}]"
        try:
            form = recognize_format(item) or RECORD_FORMATS["messages"]
            record = form.read(dict(item) if isinstance(item, Mapping) else item, source)
            check_conversation(record)
        except DataError as problem:
            problems.add(problem)
        else:
            yield record
    problems.raise_if_any()
