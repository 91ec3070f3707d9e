"""A record format: a question and its answer."""

from __future__ import annotations

from typing import Any

from lorakit import Record
from lorakit.data import Message
from lorakit.data.formats import RecordFormat
from lorakit.errors import DataError


def parse_quiz(value: dict[str, Any], source: str) -> Record:
    question, answer = value.pop("question"), value.pop("answer")
    if not isinstance(answer, str):
        raise DataError(f'{source}: "answer" must be a string')
    return Record((Message("user", question), Message("assistant", answer)), source, value)


QUIZ = RecordFormat(("question", "answer"), parse_quiz, {"reply": "answer"})
