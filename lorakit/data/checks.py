"""Checks of a data set before training: duplicates, and questions that are on both sides of a split.

A model that has seen an evaluation question in training scores for memory, not for skill. The usual cause is a question
that occurs twice with different punctuation, so questions are compared in normalized form.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

from ..errors import ConfigError, DataError
from .conversations import Record


@dataclass(frozen=True, slots=True)
class Duplicate:
    """One question that several records ask.

    Attributes:
        question: in normalized form.
        sources: the records that ask it, in order; the first is the one to keep.
        same_answer: whether all of them also have the same assistant turns.
    """

    question: str
    sources: tuple[str, ...]
    same_answer: bool


@dataclass(frozen=True, slots=True)
class Overlap:
    """One question that is both in the training and in the evaluation records: a leak."""

    question: str
    train_sources: tuple[str, ...]
    eval_sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What `check_records` found; `str()` gives a few readable lines."""

    train_count: int
    eval_count: int
    train_duplicates: tuple[Duplicate, ...]
    eval_duplicates: tuple[Duplicate, ...]
    overlaps: tuple[Overlap, ...]

    @property
    def leaked_count(self) -> int:
        """The number of evaluation records that ask the question of a training record."""
        return sum(len(overlap.eval_sources) for overlap in self.overlaps)

    def __str__(self) -> str:
        lines = [f"{self.train_count} training and {self.eval_count} evaluation records"]
        for side, found in (("training", self.train_duplicates), ("evaluation", self.eval_duplicates)):
            repeats = sum(len(duplicate.sources) - 1 for duplicate in found)
            differing = sum(not duplicate.same_answer for duplicate in found)
            if found:
                lines.append(
                    f"{repeats} {side} records repeat the question of another "
                    f"({len(found)} questions, {differing} of them with different answers)"
                )
                lines += [f"  {', '.join(item.sources[:4])}: {_shortened(item.question)}" for item in found[:3]]
        if self.overlaps:
            share = self.leaked_count / self.eval_count
            lines.append(f"LEAK: {self.leaked_count} evaluation records ({share:.0%}) are also in the training records")
            lines += [
                f"  {item.eval_sources[0]} = {item.train_sources[0]}: {_shortened(item.question)}"
                for item in self.overlaps[:5]
            ]
        elif self.eval_count:
            lines.append("no question is on both sides")
        return "\n".join(lines)


def check_records(train: Sequence[Record], evaluation: Sequence[Record] = ()) -> CheckReport:
    """Look for duplicates on each side and for leaks between them."""
    return CheckReport(
        len(train),
        len(evaluation),
        tuple(find_duplicates(train)),
        tuple(find_duplicates(evaluation)),
        tuple(find_overlap(train, evaluation)),
    )


def normalize_text(text: str) -> str:
    """Return a text without its case, width, punctuation and spacing.

    NFKC and case folding come first (Unicode Standard, section 5.18). Then punctuation (the categories P*) is removed
    and whitespace collapsed. Symbols stay: "2+2" is not "22". A text of nothing but punctuation keeps it.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    words = "".join(character for character in folded if not unicodedata.category(character).startswith("P"))
    return " ".join(unicodedata.normalize("NFKC", words).split()) or " ".join(folded.split())


def question_of(record: Record) -> str:
    """Return a record's question, normalized: its user turns, or its system and tool turns, or else everything."""
    for roles in (("user",), ("system", "tool"), ("assistant",)):
        if texts := [message.content for message in record.messages if message.role in roles]:
            return "\n".join(map(normalize_text, texts))
    return ""


def find_duplicates(records: Iterable[Record]) -> list[Duplicate]:
    """Return the questions that more than one record asks, in order of first occurrence."""
    return [
        Duplicate(question, _sources(group), len({_answers_of(record) for record in group}) == 1)
        for question, group in _grouped(records).items()
        if len(group) > 1
    ]


def find_overlap(train: Iterable[Record], evaluation: Iterable[Record]) -> list[Overlap]:
    """Return the questions that are on both sides, in the order of the evaluation records."""
    train_groups = _grouped(train)
    return [
        Overlap(question, _sources(train_groups[question]), _sources(group))
        for question, group in _grouped(evaluation).items()
        if question in train_groups
    ]


def split_records(
    records: Sequence[Record],
    eval_fraction: float,
    seed: int = 0,
    stratify_by: Callable[[Record], Hashable] | None = None,
) -> tuple[list[Record], list[Record]]:
    """Split into (train, evaluation) with no question on both sides; both keep the order of `records`.

    Records that ask the same question stay together. With `stratify_by`, each value that it returns gets its share by
    largest remainders, and keeps at least one question in training. The first record of a group of duplicates decides
    the group's value. The same records and seed give the same split on every machine.

    Raises:
        ConfigError: eval_fraction is not between 0 and 1.
        DataError: one side would be empty.
    """
    if not 0 < eval_fraction < 1:
        raise ConfigError(f"eval_fraction must be between 0 and 1, both excluded (got {eval_fraction})")
    strata: dict[Hashable, list[tuple[str, int]]] = {}  # value -> (question, number of records that ask it)
    for question, group in _grouped(records).items():
        strata.setdefault(stratify_by(group[0]) if stratify_by else None, []).append((question, len(group)))
    quotas = _apportion([sum(size for _, size in groups) for groups in strata.values()], eval_fraction)
    evaluated: set[str] = set()
    for groups, quota in zip(strata.values(), quotas, strict=True):
        shuffled = sorted(groups, key=lambda group: _rank(seed, group[0]))
        for question, size in shuffled[1:]:  # one stays in training, whatever the quota
            if size <= quota:
                evaluated.add(question)
                quota -= size
    sides: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        sides[question_of(record) in evaluated].append(record)
    if not all(sides):
        raise DataError(
            f"cannot split {len(records)} records ({sum(map(len, strata.values()))} different questions) with an "
            f"evaluation share of {eval_fraction}: one side would be empty"
        )
    return sides


def _apportion(sizes: Sequence[int], fraction: float) -> list[int]:
    """Divide round(fraction * sum) seats over strata by largest remainders (Hamilton's method)."""
    shares = [size * fraction for size in sizes]
    quotas = [int(share) for share in shares]
    left = round(sum(shares)) - sum(quotas)
    by_remainder = sorted(range(len(sizes)), key=lambda index: quotas[index] - shares[index])
    for index in by_remainder[:left]:
        quotas[index] += 1
    return quotas


def _rank(seed: int, question: str) -> bytes:
    """Return a key that orders questions at random but the same on every machine and Python version."""
    return hashlib.sha256(f"{seed}:{question}".encode()).digest()


def _grouped(records: Iterable[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(question_of(record), []).append(record)
    return groups


def _sources(records: Iterable[Record]) -> tuple[str, ...]:
    return tuple(record.source for record in records)


def _answers_of(record: Record) -> tuple[str, ...]:
    said = (message for message in record.messages if message.role == "assistant")
    return tuple(message.content + (json.dumps(dict(message.extra)) if message.extra else "") for message in said)


def _shortened(text: str, width: int = 60) -> str:
    line = text.replace("\n", " / ")
    return line if len(line) <= width else line[: width - 1] + "…"
