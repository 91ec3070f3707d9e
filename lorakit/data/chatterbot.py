"""The quickstart's data set: English small talk and trivia, to be answered with one JSON object per message.

It is built from the data files of the PyPI wheel chatterbot-corpus 1.3.3 (BSD-3-Clause); neither that package nor
ChatterBot is imported. Every answer is {"topic": ..., "reply": ...}. The task has a checkable form (does it validate?),
a checkable label (is the topic right?) and a free part (the reply).

The corpus repeats itself: about 2,000 pairs ask about 750 different questions. It is deduplicated first and then split
by topic, so that no question is on both sides.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import DataError
from ..files import sha256_file, write_text
from .checks import find_overlap, normalize_text, split_records
from .conversations import Message, Record
from .records import save_records

CORPUS_VERSION = "1.3.3"
EVAL_FRACTION = 0.15
MIN_TOPIC_SIZE = 15  # below that, 15% for evaluation would be one or two questions

# The tuned model's system prompt; `short_prompt` fills in the topics.
SHORT_SYSTEM_PROMPT = 'Answer with one JSON object, {"topic": ..., "reply": ...}. Topics: %s.'

# The untuned model's system prompt. It says everything that tuning would teach, so that the base model is compared at
# its best. `base_prompt` appends the topics.
BASE_INSTRUCTIONS = """\
You answer short messages. Answer every message with exactly one JSON object and nothing else: no text before or after \
it, no Markdown code fence, no comments.

The object has exactly two keys, in this order:
- "topic": a string, the one topic of the list below that the message belongs to, spelled exactly as in the list.
- "reply": a string that is not empty, your short answer to the message.

The form: {"topic": "<one of the topics>", "reply": "<your answer>"}

Topics, each with messages that belong to it:
"""


@dataclass(frozen=True, slots=True)
class ChatterbotReport:
    """What `build_chatterbot` kept and dropped; `str()` gives a readable summary.

    Attributes:
        folder: where the files are.
        corpus_version: version of the installed wheel.
        seed: seed of the split.
        entries: conversations in the corpus; the first two items of each make one pair.
        malformed: entries that are not [question, answer, ...], as "file:number: content".
        duplicates: pairs left out because an earlier pair has the same normalized question.
        small_topics: topics left out, with their number of different questions.
        train_topics, eval_topics: rows per topic on each side.
        sha256: name -> hash of each file written.
    """

    folder: Path
    corpus_version: str
    seed: int
    entries: int
    malformed: tuple[str, ...]
    duplicates: int
    small_topics: dict[str, int]
    train_topics: dict[str, int]
    eval_topics: dict[str, int]
    sha256: dict[str, str]

    @property
    def train_count(self) -> int:
        """Rows in train.jsonl."""
        return sum(self.train_topics.values())

    @property
    def eval_count(self) -> int:
        """Rows in eval.jsonl."""
        return sum(self.eval_topics.values())

    def __str__(self) -> str:
        dropped = ", ".join(f"{topic} {count}" for topic, count in self.small_topics.items())
        lines = [
            f"chatterbot-corpus {self.corpus_version}, English: {self.entries} conversations, the first question and "
            "answer of each (further items are not used)",
            *(f"- 1 that is no list of question and answer: {entry}" for entry in self.malformed),
            f"- {self.duplicates} whose question had come before (the first answer is kept)",
            f"- {sum(self.small_topics.values())} in topics of fewer than {MIN_TOPIC_SIZE} questions: {dropped}",
            f"= {self.train_count + self.eval_count} rows in {len(self.train_topics)} topics; "
            "no question is on both sides",
            "",
            f"{'topic':<16}{'train':>7}{'eval':>7}",
            *(f"{topic:<16}{count:>7}{self.eval_topics[topic]:>7}" for topic, count in self.train_topics.items()),
            f"{'total':<16}{self.train_count:>7}{self.eval_count:>7}",
        ]
        return "\n".join(lines)


def build_chatterbot(folder: str | os.PathLike[str], seed: int = 0) -> ChatterbotReport:
    """Write the data set into `folder`; the same seed gives the same bytes.

    Files: train.jsonl and eval.jsonl (short system prompt, question, JSON answer), schema.json (an answer's JSON
    Schema), base_prompt.txt (the system prompt for the untuned model), and, last of all, dataset_report.json.

    Raises:
        DataError: the corpus is not installed (the message has the command) or is not version 1.3.3.
        StorageError: the folder cannot be written.
    """
    target = Path(folder)
    corpus, version = _find_corpus()
    pairs, malformed = _read_pairs(corpus)
    first: dict[str, tuple[str, str, str, str]] = {}  # normalized question -> topic, question, answer, source
    for topic, question, answer, source in pairs:
        first.setdefault(normalize_text(question), (topic, question, answer, source))
    sizes = Counter(topic for topic, *_ in first.values())
    topics = sorted(topic for topic, size in sizes.items() if size >= MIN_TOPIC_SIZE)
    system = short_prompt(topics)
    records = [_record(system, *pair) for pair in first.values() if pair[0] in topics]
    train, evaluation = split_records(records, EVAL_FRACTION, seed, stratify_by=topic_of)
    if leaks := find_overlap(train, evaluation):
        raise DataError(f"the split leaks: {leaks[0].question!r} is on both sides")

    save_records(target / "train.jsonl", train)
    save_records(target / "eval.jsonl", evaluation)
    write_text(target / "schema.json", _pretty_json(answer_schema(topics)))
    write_text(target / "base_prompt.txt", base_prompt(train))
    names = ("train.jsonl", "eval.jsonl", "schema.json", "base_prompt.txt")
    report = ChatterbotReport(
        folder=target,
        corpus_version=version,
        seed=seed,
        entries=len(pairs) + len(malformed),
        malformed=tuple(malformed),
        duplicates=len(pairs) - len(first),
        small_topics={topic: sizes[topic] for topic in sorted(sizes) if sizes[topic] < MIN_TOPIC_SIZE},
        train_topics=_topic_counts(train, topics),
        eval_topics=_topic_counts(evaluation, topics),
        sha256={name: sha256_file(target / name) for name in names},
    )
    write_text(target / "dataset_report.json", _pretty_json(_report_json(report)))
    return report


def answer_schema(topics: Sequence[str]) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of an answer."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"topic": {"enum": list(topics)}, "reply": {"type": "string", "minLength": 1}},
        "required": ["topic", "reply"],
        "additionalProperties": False,
    }


def short_prompt(topics: Sequence[str]) -> str:
    """Return the system prompt for the tuned model, in training and after."""
    return SHORT_SYSTEM_PROMPT % ", ".join(topics)


def base_prompt(train: Sequence[Record], hints: int = 3) -> str:
    """Return the system prompt for the untuned model: `BASE_INSTRUCTIONS`, then each topic with some of its questions.

    The questions come from the training records only and are spread evenly over each topic's.
    """
    questions: dict[str, list[str]] = {}
    for record in train:
        questions.setdefault(topic_of(record), []).append(record.messages[1].content)
    lines = []
    for topic, asked in sorted(questions.items()):
        short = [question for question in asked if len(question) <= 60 and "\n" not in question] or asked
        chosen = [short[len(short) * index // hints] for index in range(min(hints, len(short)))]
        lines.append(f"- {topic}: {', '.join(json.dumps(question, ensure_ascii=False) for question in chosen)}")
    return BASE_INSTRUCTIONS + "\n".join(lines) + "\n"


def topic_of(record: Record) -> str:
    """Return the topic in a record's answer."""
    return str(json.loads(record.messages[-1].content)["topic"])


def _find_corpus() -> tuple[Path, str]:
    """Return the folder of the English files and the wheel's version, without importing the package."""
    command = f"pip install --no-deps chatterbot-corpus=={CORPUS_VERSION}"
    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the chatterbot corpus is not installed; install it with: {command}")
    corpus = Path(spec.submodule_search_locations[0]) / "data" / "english"
    if not corpus.is_dir():
        raise DataError(f"the installed chatterbot corpus has no folder {corpus}; install it again with: {command}")
    try:
        version = importlib.metadata.version("chatterbot-corpus")
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"  # a copied folder; the report's hashes identify it
    else:
        if version != CORPUS_VERSION:
            raise DataError(f"chatterbot-corpus {version} is installed, expected {CORPUS_VERSION}; run: {command}")
    return corpus, version


def _read_pairs(corpus: Path) -> tuple[list[tuple[str, str, str, str]], list[str]]:
    """Return (topic, question, answer, source) of every conversation, and the malformed entries."""
    pairs: list[tuple[str, str, str, str]] = []
    malformed: list[str] = []
    for path in sorted(corpus.glob("*.yml"), key=lambda path: path.name):
        # BaseLoader is as safe as SafeLoader and leaves every value as written: `yes`, `1984` and dates stay strings.
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
        for number, entry in enumerate(content["conversations"], start=1):
            source = f"{path.name}:{number}"
            texts = [item.strip() for item in entry[:2] if isinstance(item, str)] if isinstance(entry, list) else []
            if len(texts) == 2 and all(texts):
                pairs.append((path.stem, texts[0], texts[1], source))
            else:
                malformed.append(f"{source}: {entry}")
    return pairs, malformed


def _record(system: str, topic: str, question: str, answer: str, source: str) -> Record:
    response = json.dumps({"topic": topic, "reply": answer}, ensure_ascii=False)
    messages = (Message("system", system), Message("user", question), Message("assistant", response))
    return Record(messages, source)


def _topic_counts(records: Sequence[Record], topics: Sequence[str]) -> dict[str, int]:
    counts = Counter(map(topic_of, records))
    return {topic: counts[topic] for topic in topics}


def _report_json(report: ChatterbotReport) -> dict[str, Any]:
    """Return the report without the folder, so that the same data set has the same report anywhere."""
    values = asdict(report)
    del values["folder"]
    return {
        "source": "the English data files of the PyPI wheel chatterbot-corpus",
        "license": "BSD-3-Clause",
        "train_count": report.train_count,
        "eval_count": report.eval_count,
        **values,
    }


def _pretty_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"
