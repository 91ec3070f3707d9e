"""The quickstart's data set, built from the installed corpus: its numbers, its form, and the same bytes every time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jsonschema
import pytest

from lorakit.data import Record, encode_records, find_duplicates, find_overlap, load_records
from lorakit.data.chatterbot import (
    BASE_INSTRUCTIONS,
    ChatterbotReport,
    answer_schema,
    build_chatterbot,
    short_prompt,
    topic_of,
)
from lorakit.errors import DataError
from lorakit.files import sha256_file
from lorakit.models.tokenizer.tokenizer import Tokenizer

Built = tuple[ChatterbotReport, list[Record], list[Record]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    report = build_chatterbot(tmp_path_factory.mktemp("chatterbot"), seed=0)
    return report, load_records(report.folder / "train.jsonl"), load_records(report.folder / "eval.jsonl")


def test_numbers(built: Built) -> None:
    report, train, evaluation = built
    assert report.entries == 2026
    assert len(report.malformed) == 1
    assert report.malformed[0].startswith("trivia.yml:14: In a game of bingo")
    assert report.entries - len(report.malformed) - report.duplicates == 747
    assert sum(report.small_topics.values()) == 747 - 661
    assert (report.train_count, report.eval_count) == (len(train), len(evaluation)) == (562, 99)
    assert len(report.train_topics) == len(report.small_topics) + 1 == 11


def test_split_is_stratified_and_does_not_leak(built: Built) -> None:
    report, train, evaluation = built
    assert find_overlap(train, evaluation) == []
    assert find_duplicates(train + evaluation) == []
    for topic, count in report.train_topics.items():
        evaluated = report.eval_topics[topic]
        assert abs(evaluated - 0.15 * (count + evaluated)) < 1
        assert count == sum(topic_of(record) == topic for record in train)


def test_every_answer_is_one_valid_object(built: Built) -> None:
    report, train, evaluation = built
    schema = json.loads((report.folder / "schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for record in train + evaluation:
        system, user, assistant = record.messages
        assert (system.role, user.role, assistant.role) == ("system", "user", "assistant")
        assert system.content == short_prompt(sorted(report.train_topics))
        answer = json.loads(assistant.content)
        validator.validate(answer)
        assert list(answer) == ["topic", "reply"]
        assert json.dumps(answer, ensure_ascii=False) == assistant.content
        assert "\n" not in assistant.content


def test_schema_refuses_wrong_answers() -> None:
    validator = jsonschema.Draft202012Validator(answer_schema(["ai", "money"]))
    assert validator.is_valid({"topic": "ai", "reply": "yes"})
    wrong = [{"topic": "AI", "reply": "yes"}, {"topic": "ai"}, {"topic": "ai", "reply": ""}, {"reply": "yes"}, []]
    for answer in [*wrong, {"topic": "ai", "reply": 3}, {"topic": "ai", "reply": "yes", "more": 1}]:
        assert not validator.is_valid(answer)


def test_yaml_values_stay_as_written(built: Built) -> None:
    """A YAML 1.1 loader reads the corpus's bare `No`, `23` or `1945` as false and as numbers."""
    _, train, evaluation = built
    replies = [json.loads(record.messages[2].content)["reply"] for record in train + evaluation]
    assert any(reply.isdigit() for reply in replies)
    assert not {"True", "False", "None"} & set(replies)


def test_base_prompt_has_every_topic_and_no_evaluation_question(built: Built) -> None:
    report, train, evaluation = built
    prompt = (report.folder / "base_prompt.txt").read_text(encoding="utf-8")
    assert prompt.startswith(BASE_INSTRUCTIONS)
    lines = prompt.removeprefix(BASE_INSTRUCTIONS).splitlines()
    assert [line.split(":")[0] for line in lines] == [f"- {topic}" for topic in report.train_topics]
    asked = {record.messages[1].content: topic_of(record) for record in train}
    for line in lines:
        topic, hints = line.removeprefix("- ").split(": ", 1)
        questions = json.loads(f"[{hints}]")
        assert len(questions) == 3
        assert all(asked[question] == topic for question in questions)
    assert not any(json.dumps(record.messages[1].content) in prompt for record in evaluation)


def test_same_seed_same_bytes(built: Built, tmp_path: Path) -> None:
    report, _, _ = built
    again = build_chatterbot(tmp_path / "again", seed=0)
    names = ["base_prompt.txt", "dataset_report.json", "eval.jsonl", "schema.json", "train.jsonl"]
    assert sorted(path.name for path in again.folder.iterdir()) == names
    for name in names:
        assert (again.folder / name).read_bytes() == (report.folder / name).read_bytes()
    assert again.sha256 == report.sha256
    assert again.sha256["train.jsonl"] == sha256_file(again.folder / "train.jsonl")
    other = build_chatterbot(tmp_path / "other", seed=1)
    assert other.sha256["eval.jsonl"] != report.sha256["eval.jsonl"]
    assert other.sha256["schema.json"] == report.sha256["schema.json"]


def test_summary_and_report_file(built: Built) -> None:
    report, _, _ = built
    summary = str(report)
    for part in (
        "2026 conversations",
        "trivia.yml:14",
        "1278 whose question",
        "tech_support 10",
        "661 rows in 11 topics",
    ):
        assert part in summary
    written = json.loads((report.folder / "dataset_report.json").read_text(encoding="utf-8"))
    assert written["train_count"] == 562
    assert written["license"] == "BSD-3-Clause"
    assert str(report.folder) not in json.dumps(written)


def test_missing_corpus_gives_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "chatterbot_corpus", None)  # what Python takes for "cannot be imported"
    with pytest.raises(DataError, match=r"pip install --no-deps chatterbot-corpus==1\.3\.3"):
        build_chatterbot(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_rows_fit_a_short_context(built: Built, smollm2: Tokenizer) -> None:
    _, train, evaluation = built
    lengths = [len(example.input_ids) for example in encode_records(smollm2, train + evaluation, max_length=512)]
    assert sorted(lengths)[len(lengths) // 2] < 110
