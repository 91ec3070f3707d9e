"""Task metrics: the score of each held-out output, and the table that turns a recipe's `kind` into a function.

A metric is a function (its settings, outputs, references) -> one score per row. Scores per row, instead of one number,
make exact bootstrap intervals and paired comparisons possible. A new metric is one function and one line in `METRICS`,
which the recipe, the report and the reference page read. Its line names its parameter class: `MetricConfig` without
parameters, `FieldMetric` or `SchemaMetric`.

Shares and accuracies run from 0 to 1, chrF from 0 to 100, as the field reports them. strict_json.py reads the JSON.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from pydantic import ConfigDict, Field, field_validator, model_validator

from ..data.conversations import Problems
from ..errors import ConfigError, DataError, did_you_mean
from ..settings import Settings
from .bootstrap import Scores, bootstrap_interval
from .strict_json import parse_json, same_json

RESERVED_NAMES = ("perplexity_general", "intervals")  # keys beside the metrics in a run's metrics.json


@dataclass(frozen=True)
class Score:
    """A metric over the held-out set.

    Attributes:
        value: the mean over the rows, in the metric's unit.
        low, high: its 95% bootstrap interval.
        count: the number of rows.
        best: the highest value the metric can take: 1 or 100.
        rows: the score of each row, shape (count,), for paired comparisons.
    """

    value: float
    low: float
    high: float
    count: int
    best: float = 1.0
    rows: Scores = field(default_factory=lambda: np.empty(0), repr=False, compare=False)


class MetricConfig(Settings):
    """A metric as a recipe names it: its `kind`, and optionally a `name` for tables."""

    kind: str
    name: str | None = Field(default=None, min_length=1)

    @property
    def label(self) -> str:
        """The name in tables and files: `name`, or the kind's default, such as "topic_accuracy"."""
        return self.name or METRICS[self.kind].default_name.format(**self.model_dump())

    @property
    def best(self) -> float:
        """The highest value the metric can take."""
        return METRICS[self.kind].best

    @field_validator("kind")
    @classmethod
    def _kind_fits_class(cls, kind: str) -> str:
        if kind not in METRICS:
            raise ValueError(_unknown_kind(kind))
        if METRICS[kind].parameters is not cls:
            raise ValueError(f"'{kind}' takes a {METRICS[kind].parameters.__name__}, not a {cls.__name__}")
        return kind

    @field_validator("name")
    @classmethod
    def _name_is_free(cls, name: str | None) -> str | None:
        if name in RESERVED_NAMES:
            raise ValueError(f"'{name}' is taken in metrics.json; choose another name")
        return name


class FieldMetric(MetricConfig):
    """A metric over one top-level field of a JSON object."""

    field: str = Field(min_length=1)


class SchemaMetric(MetricConfig):
    """A metric against a JSON Schema, given inline as `schema` or as the path of a JSON file, `schema_file`."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    inline_schema: dict[str, Any] | None = Field(default=None, alias="schema")  # pydantic keeps `schema` for itself
    schema_file: Path | None = None

    @model_validator(mode="after")
    def _one_schema(self) -> SchemaMetric:
        if (self.inline_schema is None) == (self.schema_file is None):
            raise ValueError("give the schema once: either 'schema' (inline) or 'schema_file' (a path)")
        return self

    def load(self) -> dict[str, Any]:
        """Return the schema.

        Raises:
            ConfigError: the file cannot be read or does not hold one JSON object.
        """
        if self.schema_file is None:
            assert self.inline_schema is not None  # _one_schema
            return self.inline_schema
        try:
            schema = parse_json(self.schema_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"schema_file {self.schema_file} cannot be read: {error}") from error
        if not isinstance(schema, dict):
            raise ConfigError(f"schema_file {self.schema_file} holds a {type(schema).__name__}, expected a JSON object")
        return schema


def metric_config(values: Any) -> MetricConfig:
    """Build the right `MetricConfig` from a mapping with `kind`, or from a bare kind such as "chrf".

    Raises:
        ConfigError: the kind is unknown, or does not take these parameters.
    """
    if isinstance(values, MetricConfig):
        return values
    if isinstance(values, str):
        values = {"kind": values}
    if not isinstance(values, Mapping) or "kind" not in values:
        message = f"a metric is a mapping with 'kind', one of {', '.join(METRICS)}; got {values!r}"
        raise ConfigError(message, [("", message)])
    kind = str(values["kind"])
    if kind not in METRICS:
        raise ConfigError(_unknown_kind(kind), [("kind", _unknown_kind(kind))])
    return METRICS[kind].parameters(**values)


def evaluate_outputs(
    outputs: Sequence[str],
    references: Sequence[str],
    metrics: Sequence[MetricConfig],
    sources: Sequence[str] | None = None,
    samples: int = 2000,
    seed: int = 0,
) -> dict[str, Score]:
    """Score `outputs` against `references`, row by row, on every metric.

    Args:
        outputs, references: the model's texts and the reference texts, in the same order.
        metrics: the metrics; the result has their labels as keys, in their order.
        sources: the source of each row ("eval.jsonl:17"), for messages.
        samples, seed: settings of the bootstrap.

    Raises:
        DataError: no rows, unequal lengths, or a reference that `check_references` refuses.
        ConfigError: a schema is unreadable or invalid, or a metric's package is not installed.
    """
    if len(outputs) != len(references):
        raise DataError(f"{len(outputs)} outputs cannot be scored against {len(references)} references")
    check_references(references, metrics, sources)
    scores = {}
    for metric in metrics:
        rows = METRICS[metric.kind].rows(metric, outputs, references)
        low, high = bootstrap_interval(rows, samples=samples, seed=seed)
        scores[metric.label] = Score(float(rows.mean()), low, high, len(rows), metric.best, rows)
    return scores


def check_references(
    references: Sequence[str], metrics: Sequence[MetricConfig], sources: Sequence[str] | None = None
) -> None:
    """Make sure that every reference gets the best score against itself; call it before an hour of training.

    Raises:
        DataError: a reference does not; the first 20 are listed with their source.
        ConfigError: as `evaluate_outputs`.
    """
    problems = Problems()
    for metric in metrics:
        rows = METRICS[metric.kind].rows(metric, references, references)
        needs = METRICS[metric.kind].reference_needs.format(**metric.model_dump())
        for index in np.flatnonzero(rows < metric.best - 1e-6).tolist():
            where = sources[index] if sources is not None else f"reference {index} (counting from 0)"
            message = f"'{metric.label}' needs a reference that is {needs}; got {_excerpt(references[index])}"
            problems.add(DataError(f"{where}: {message}"))
    problems.raise_if_any()


def row_scores(scores: Mapping[str, Score], index: int) -> dict[str, float]:
    """Return the score of row `index` on each metric, for predictions.jsonl."""
    return {name: float(score.rows[index]) for name, score in scores.items()}


def scores_as_json(scores: Mapping[str, Score], perplexity_general: float | None = None) -> dict[str, Any]:
    """Return one side of metrics.json: a value per metric, their intervals, and the perplexity on general text."""
    return {
        **{name: score.value for name, score in scores.items()},
        "perplexity_general": perplexity_general,
        "intervals": {name: [score.low, score.high] for name, score in scores.items()},
    }


# The metrics ----------------------------------------------------------------------------------------------------------


def exact_match(metric: MetricConfig, outputs: Sequence[str], references: Sequence[str]) -> Scores:
    """1 where the output equals the reference after stripping surrounding whitespace, else 0."""
    return _scores(output.strip() == reference.strip() for output, reference in zip(outputs, references, strict=True))


def chrf(metric: MetricConfig, outputs: Sequence[str], references: Sequence[str]) -> Scores:
    """Sentence chrF2 of the whole text (Popović 2015), 0 to 100, as sacrebleu computes it with its defaults.

    The reported value is the mean over rows. sacrebleu's corpus chrF pools n-gram counts instead, so long rows weigh
    more. Only a mean over rows can be bootstrapped and compared row by row exactly.
    """
    sentence_chrf = _optional("sacrebleu", metric.kind).sentence_chrf
    return _scores(sentence_chrf(text, [reference]).score for text, reference in zip(outputs, references, strict=True))


def json_schema(metric: SchemaMetric, outputs: Sequence[str], references: Sequence[str]) -> Scores:
    """1 where the output is exactly one JSON value valid against the schema, else 0; references are not used.

    `$schema` names the draft, by default 2020-12. "format" is an annotation, the standard's default. A `$ref` resolves
    inside the schema only; nothing is fetched.
    """
    jsonschema, referencing = _optional("jsonschema", metric.kind), _optional("referencing", metric.kind)
    schema = metric.load()
    validator_class = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        validator_class.check_schema(schema)
    except jsonschema.SchemaError as error:
        message = f"metric '{metric.label}': the schema is not valid at {error.json_path}: {error.message}"
        raise ConfigError(message) from error
    validator = validator_class(schema, registry=referencing.Registry())
    missing = referencing.exceptions.Unresolvable

    def unresolved(error: Any) -> ConfigError:
        return ConfigError(f"metric '{metric.label}': the schema refers to {error.ref!r}, which it does not hold")

    def valid(output: str) -> bool:
        try:
            return bool(validator.is_valid(parse_json(output)))
        except missing as error:
            raise unresolved(error) from error
        except (ValueError, RecursionError):
            return False

    for reference in _schema_references(schema):  # an answer may lead to one that no right answer leads to
        try:
            validator.evolve(schema={"$ref": reference}).is_valid(None)
        except missing as error:
            raise unresolved(error) from error
    return _scores(valid(output) for output in outputs)


def json_field_equals(metric: FieldMetric, outputs: Sequence[str], references: Sequence[str]) -> Scores:
    """1 where the output is a JSON object whose field holds the same JSON value as the reference's, else 0."""

    def equal(output: str, reference: str) -> bool:
        found, expected = read_field(output, metric.field), read_field(reference, metric.field)
        return found is not MISSING and expected is not MISSING and same_json(found, expected)

    return _scores(equal(output, reference) for output, reference in zip(outputs, references, strict=True))


def field_key(metric: FieldMetric, reference: str) -> Hashable:
    """Return the value of the reference's field as text; None where it is absent."""
    value = read_field(reference, metric.field)
    return None if value is MISSING else repr(value)  # a list or an object cannot be hashed


def json_field_chrf(metric: FieldMetric, outputs: Sequence[str], references: Sequence[str]) -> Scores:
    """Sentence chrF2 (0 to 100) between the texts in one field; 0 where the output is not JSON or has no text there.

    Averaged over rows, for the reason given at `chrf`.
    """
    sentence_chrf = _optional("sacrebleu", metric.kind).sentence_chrf

    def similarity(output: str, reference: str) -> float:
        found, expected = read_field(output, metric.field), read_field(reference, metric.field)
        if not isinstance(found, str) or not isinstance(expected, str):
            return 0.0
        return float(sentence_chrf(found, [expected]).score)

    return _scores(similarity(output, reference) for output, reference in zip(outputs, references, strict=True))


@dataclass(frozen=True)
class Metric:
    """One line of the table below.

    Attributes:
        parameters: the settings class that the function takes first.
        rows: (settings, outputs, references) -> scores, shape (rows,), float64.
        default_name: the label without a `name`; may use the settings' fields.
        best: the highest score of a row; a reference must reach it against itself.
        reference_needs: the condition for that, in words: "a reference that is ...".
        example_key: (settings, reference) -> the value that should differ between the base model's worked examples,
            for a metric that scores one of a few values, such as a topic; None for other metrics.
    """

    parameters: type[MetricConfig]
    rows: Callable[[Any, Sequence[str], Sequence[str]], Scores]
    default_name: str
    best: float
    reference_needs: str
    example_key: Callable[[Any, str], Hashable] | None = None


METRICS: dict[str, Metric] = {
    "exact_match": Metric(MetricConfig, exact_match, "exact_match", 1.0, "text"),
    "chrf": Metric(MetricConfig, chrf, "chrf", 100.0, "some text"),
    "json_schema": Metric(SchemaMetric, json_schema, "schema_valid", 1.0, "one JSON value valid against the schema"),
    "json_field_equals": Metric(
        FieldMetric, json_field_equals, "{field}_accuracy", 1.0, "one JSON object with the field '{field}'", field_key
    ),
    "json_field_chrf": Metric(
        FieldMetric, json_field_chrf, "{field}_chrf", 100.0, "one JSON object with text in the field '{field}'"
    ),
}


# Small helpers --------------------------------------------------------------------------------------------------------

MISSING = object()  # an absent field; not None, which is a JSON value


def read_field(text: str, name: str) -> Any:
    """Return a top-level field of the JSON object in `text`, or `MISSING`."""
    try:
        value = parse_json(text)
    except ValueError:
        return MISSING
    return value.get(name, MISSING) if isinstance(value, dict) else MISSING


def _schema_references(schema: Any) -> Iterator[str]:
    """Yield every "$ref" of a schema, except below another "$id", to which it would be relative."""
    items: Iterable[Any] = ()
    if isinstance(schema, Mapping):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        items = [value for key, value in schema.items() if key not in ("const", "default", "enum", "examples")]
    elif isinstance(schema, list):
        items = schema
    for item in items:
        if not (isinstance(item, Mapping) and "$id" in item):
            yield from _schema_references(item)


def _scores(scores: Iterable[float]) -> Scores:
    return np.fromiter(scores, dtype=np.float64)


def _optional(package: str, kind: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(f"metric '{kind}' needs the package {package}: pip install 'lorakit[eval]'") from error


def _unknown_kind(kind: str) -> str:
    return f"unknown metric '{kind}'{did_you_mean(kind, METRICS)} (known: {', '.join(METRICS)})"


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
