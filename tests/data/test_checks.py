"""Duplicates and leaks are found whatever the spelling, and a split never makes one."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lorakit.data import Message, Record, check_records, find_duplicates, find_overlap, split_records
from lorakit.data.checks import normalize_text, question_of
from lorakit.errors import ConfigError, DataError


def record(question: str, answer: str = "yes", source: str = "t.jsonl:1", topic: str = "") -> Record:
    return Record((Message("user", question), Message("assistant", answer)), source, {"topic": topic})


def numbered(name: str, *questions: str) -> list[Record]:
    return [record(question, source=f"{name}:{number}") for number, question in enumerate(questions, start=1)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is AI?", "what is ai"),
        ("  What\tis\nAI ?!", "What is AI"),
        ("ＷＨＡＴ is AI？", "What is AI?"),
        ("what's up", "Whats up?"),
        ("“Straße”", "STRASSE"),
        ("caf\u00e9", "cafe\u0301"),
        ("ﬁne…", "fine..."),
    ],
)
def test_spellings_of_one_question(one: str, other: str) -> None:
    assert normalize_text(one) == normalize_text(other)


@pytest.mark.parametrize(("one", "other"), [("2+2", "22"), ("?", "!"), ("résumé", "resume"), ("C++", "C"), ("", "?")])
def test_different_questions(one: str, other: str) -> None:
    assert normalize_text(one) != normalize_text(other)


@given(st.text())
@example("e.\u0301")  # without the full stop, the accent joins the letter
def test_normalizing_twice_changes_nothing(text: str) -> None:
    assert normalize_text(normalize_text(text)) == normalize_text(text)


def test_question_is_all_user_turns() -> None:
    turns = (Message("system", "Be brief."), Message("user", "A?"), Message("assistant", "b"), Message("user", "C!"))
    assert question_of(Record(turns, "t:1")) == "a\nc"
    assert question_of(Record((Message("system", "Say hi."), Message("assistant", "Hi")), "t:1")) == "say hi"
    assert question_of(Record((Message("assistant", "Hi!"),), "t:1")) == "hi"


def test_find_duplicates_names_all_sources() -> None:
    records = [
        record("A?", "yes", "t:1"),
        record("b", "yes", "t:2"),
        record("a", "no", "t:3"),
        record("B!", "yes", "t:4"),
    ]
    first, second = find_duplicates(records)
    assert (first.question, first.sources, first.same_answer) == ("a", ("t:1", "t:3"), False)
    assert (second.question, second.sources, second.same_answer) == ("b", ("t:2", "t:4"), True)
    assert find_duplicates(records[:2]) == []


def test_find_overlap_names_both_sides() -> None:
    (found,) = find_overlap(numbered("train", "a", "b?", "B"), numbered("eval", "c", "b!"))
    assert found.question == "b"
    assert found.train_sources == ("train:2", "train:3")
    assert found.eval_sources == ("eval:2",)


def test_report_says_what_was_found() -> None:
    report = check_records(numbered("train", "a", "b?", "B"), numbered("eval", "c", "b!", "x", "y"))
    assert report.leaked_count == 1
    assert str(report).splitlines() == [
        "3 training and 4 evaluation records",
        "1 training records repeat the question of another (1 questions, 0 of them with different answers)",
        "  train:2, train:3: b",
        "LEAK: 1 evaluation records (25%) are also in the training records",
        "  eval:2 = train:2: b",
    ]
    clean = check_records(numbered("train", "a"), numbered("eval", "b"))
    assert str(clean).splitlines() == ["1 training and 1 evaluation records", "no question is on both sides"]
    assert str(check_records(numbered("train", "a"))) == "1 training and 0 evaluation records"


QUESTIONS = st.lists(st.tuples(st.sampled_from("abcdefghijklmno"), st.sampled_from("xyz")), min_size=2, max_size=60)


@given(QUESTIONS, st.floats(0.05, 0.95), st.integers())
def test_split_keeps_everything_and_never_leaks(drawn: list[tuple[str, str]], fraction: float, seed: int) -> None:
    records = [record(question, source=f"t:{n}", topic=topic) for n, (question, topic) in enumerate(drawn)]
    try:
        train, evaluation = split_records(records, fraction, seed, stratify_by=lambda item: item.extra["topic"])
    except DataError as error:
        assert "one side would be empty" in str(error)
        return
    assert train
    assert evaluation
    assert find_overlap(train, evaluation) == []
    number = {item.source: position for position, item in enumerate(records)}
    for side in (train, evaluation):
        assert [number[item.source] for item in side] == sorted(number[item.source] for item in side)
    assert sorted(number[item.source] for item in train + evaluation) == list(range(len(records)))
    assert len(evaluation) <= round(fraction * len(records)) + 1
    assert (train, evaluation) == split_records(records, fraction, seed, stratify_by=lambda item: item.extra["topic"])


def test_split_is_stratified_by_largest_remainders() -> None:
    sizes = {"a": 33, "b": 33, "c": 34, "lonely": 1}
    records = [record(f"{topic} {number}", topic=topic) for topic, size in sizes.items() for number in range(size)]
    train, evaluation = split_records(records, 0.15, seed=1, stratify_by=lambda item: item.extra["topic"])
    assert Counter(item.extra["topic"] for item in evaluation) == {"a": 5, "b": 5, "c": 5}
    assert len(train) + len(evaluation) == 101


def test_split_takes_no_value_from_training_altogether() -> None:
    records = [record(f"{topic} {number}", topic=topic) for topic in "abcdef" for number in range(2)]
    train, _ = split_records(records, 0.9, stratify_by=lambda item: item.extra["topic"])
    assert sorted(item.extra["topic"] for item in train) == list("abcdef")


def test_split_depends_on_the_seed() -> None:
    records = numbered("t", *(f"question {number}" for number in range(50)))
    assert len({str(split_records(records, 0.2, seed)) for seed in range(10)}) == 10
    assert {len(split_records(records, 0.2, seed)[1]) for seed in range(10)} == {10}


def test_impossible_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="eval_fraction"):
        split_records(numbered("t", "a", "b"), 1.0)
    with pytest.raises(DataError, match=r"2 records \(1 different questions\)"):
        split_records(numbered("t", "a", "A"), 0.5)
    with pytest.raises(DataError, match="one side would be empty"):
        split_records(numbered("t", "a", "b"), 0.01)
