"""Record formats: how a file's format is told, and the errors that name it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy_record_format import QUIZ as TOY

from lorakit import Record, load_records, save_records
from lorakit.data import Message, iter_records
from lorakit.data.formats import RECORD_FORMATS
from lorakit.errors import ConfigError, DataError
from lorakit.runs.recipe import DataSection

MESSAGES = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
QUIZ = {"question": "Hi", "answer": "Hello", "level": 3}


@pytest.fixture
def quiz(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECORD_FORMATS, "quiz", TOY)


def written(folder: Path, *values: object) -> Path:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


@pytest.mark.usefixtures("quiz")
class TestTwoFormats:
    @pytest.mark.parametrize("name", ["auto", "quiz"])
    def test_loads_and_is_saved(self, name: str, tmp_path: Path) -> None:
        path = written(tmp_path, QUIZ, {**QUIZ, "answer": "Good day"})
        records = load_records(path, name)
        assert records[0] == Record(
            (Message("user", "Hi"), Message("assistant", "Hello")), "train.jsonl:1", {"level": 3}
        )
        save_records(path, records)
        assert load_records(path) == records == load_records(path, "messages")

    def test_the_first_line_that_is_recognized_decides(self, tmp_path: Path) -> None:
        with pytest.raises(DataError) as caught:
            load_records(written(tmp_path, {"text": "?"}, QUIZ, MESSAGES, {"question": "Hi", "reply": "Hello"}))
        first, second, third = str(caught.value).splitlines()
        assert first.startswith('train.jsonl:1: the key "messages" is missing')
        assert second.startswith('train.jsonl:3: the key "question" is missing; found "messages"')
        assert third.startswith('train.jsonl:4: the key "answer" is missing') and "where it says 'reply'" in third
        assert [record.source for record in load_records(written(tmp_path, MESSAGES, {**MESSAGES, **QUIZ}))] == [
            "train.jsonl:1", "train.jsonl:2",
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("value", "problem"),
        [
            (["Hi"], 'expected an object with "question" and "answer", found a list'),
            ({**QUIZ, "answer": 3}, '"answer" must be a string'),
            ({**QUIZ, "answer": " "}, "message 2: the assistant's content is empty"),
            ({**QUIZ, "question": "\ud83d"}, "message 1: the content holds half of a surrogate pair"),
            (MESSAGES, 'the key "question" is missing'),
        ],
    )
    def test_what_is_wrong_is_named(self, value: object, problem: str, tmp_path: Path) -> None:
        with pytest.raises(DataError) as caught:
            load_records(written(tmp_path, QUIZ, value), "quiz")
        assert str(caught.value).startswith("train.jsonl:2: ") and problem in str(caught.value)

    def test_a_recipe_names_it(self) -> None:
        assert DataSection(train="x.jsonl").format == "auto"
        assert DataSection(train="x.jsonl", format="quiz").format == "quiz"
        with pytest.raises(ConfigError, match=r"format: unknown record format 'quizz'; did you mean 'quiz'\?"):
            DataSection(train="x.jsonl", format="quizz")


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'massages'; did you mean 'messages'\? \(known: auto, messages\)"):
        next(iter_records(written(tmp_path, MESSAGES), "massages"))


def test_save_does_not_touch_the_record_it_checks(tmp_path: Path) -> None:
    record = Record((Message("assistant", "Hello"),), "a:1", {"level": 3})
    save_records(tmp_path / "out.jsonl", [record])
    assert record.extra == {"level": 3} and load_records(tmp_path / "out.jsonl")[0].extra == {"level": 3}
