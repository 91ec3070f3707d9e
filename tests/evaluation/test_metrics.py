"""Each metric on rows worked out by hand, and the errors that keep a run from being scored wrongly."""

import json
import sys

import numpy as np
import pytest
from sacrebleu.metrics import CHRF
from toy_metric import SHARED

from lorakit.data import Message, Record
from lorakit.errors import ConfigError, DataError
from lorakit.evaluation import EvalConfig, key_for_metrics, verdict
from lorakit.evaluation.metrics import (
    METRICS,
    check_references,
    evaluate_outputs,
    metric_config,
    row_scores,
    scores_as_json,
)

SCHEMA = {
    "type": "object",
    "properties": {"topic": {"enum": ["history", "sports"]}, "year": {"type": "integer"}},
    "required": ["topic"],
    "additionalProperties": False,
}


def rows(metric, outputs, references=None):
    settings = metric_config(metric)
    return METRICS[settings.kind].rows(settings, outputs, references if references is not None else outputs).tolist()


def test_exact_match_ignores_surrounding_whitespace_only():
    assert rows("exact_match", [" yes\n", "Yes", "y es", ""], ["yes", "yes", "yes", ""]) == [1, 0, 0, 1]


def test_chrf_is_sacrebleus_sentence_score():
    outputs, references = ["the cat sat", "", "dog"], ["the cat sat", "the cat", "the dog ran"]
    expected = [
        CHRF().sentence_score(output, [reference]).score for output, reference in zip(outputs, references, strict=True)
    ]
    assert rows("chrf", outputs, references) == pytest.approx(expected)
    assert expected[0] == 100.0 and expected[1] == 0.0


def test_json_schema_takes_the_whole_output_or_nothing():
    outputs = [
        '{"topic": "history"}',
        ' {"topic": "sports", "year": 1990}\n',
        '{"topic": "cooking"}',
        '{"topic": "history", "mood": "good"}',
        '{"topic": "history", "year": "1990"}',
        'Sure! {"topic": "history"}',
        '```json\n{"topic": "history"}\n```',
        '{"topic": "history"} {"topic": "history"}',
        '{"topic": "cooking", "topic": "history"}',
        '["history"]',
        "",
    ]
    assert rows({"kind": "json_schema", "schema": SCHEMA}, outputs) == [1, 1] + [0] * 9


def test_json_schema_from_a_file_resolves_references_inside_it(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({"$defs": {"short": {"maxLength": 3}}, "items": {"$ref": "#/$defs/short"}}))
    assert rows({"kind": "json_schema", "schema_file": path}, ['["abc"]', '["abcd"]']) == [1, 0]


def test_json_schema_survives_nesting_deeper_than_the_stack():
    schema = {"$ref": "#/$defs/nest", "$defs": {"nest": {"type": "array", "items": {"$ref": "#/$defs/nest"}}}}
    deep = "[" * 600 + "]" * 600
    assert rows({"kind": "json_schema", "schema": schema}, [deep, "[[]]"]) == [0, 1]


@pytest.mark.parametrize(
    "schema, message",
    [({"type": "objekt"}, r"not valid at \$\.type"), ({"$ref": "https://example.com/schema.json"}, "does not hold")],
)
def test_json_schema_that_cannot_be_used_is_a_config_error(schema, message):
    with pytest.raises(ConfigError, match=message):
        rows({"kind": "json_schema", "schema": schema}, ["{}"])


@pytest.mark.parametrize("content", ["[1]", "{", None])
def test_schema_file_that_cannot_be_used_is_a_config_error(tmp_path, content):
    path = tmp_path / "schema.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"schema\.json"):
        rows({"kind": "json_schema", "schema_file": path}, ["{}"])


def test_json_field_equals_compares_values_and_counts_bad_json_as_wrong():
    reference = '{"topic": "history", "n": 1}'
    outputs = ['{"topic":"history"}', '{"topic": "History"}', "history", '{"n": 1}', '["topic"]', '{"topic": null}']
    assert rows({"kind": "json_field_equals", "field": "topic"}, outputs, [reference] * 6) == [1, 0, 0, 0, 0, 0]
    assert rows({"kind": "json_field_equals", "field": "n"}, ['{"n": 1.0}', '{"n": true}'], [reference] * 2) == [1, 0]


def test_json_field_chrf_scores_text_in_a_field():
    references = ['{"answer": "He was born in 1901."}'] * 4
    outputs = ['{"answer": "He was born in 1901."}', '{"answer": "She was born in 1901."}', '{"answer": 1901}', "1901"]
    found = rows({"kind": "json_field_chrf", "field": "answer"}, outputs, references)
    assert found[0] == 100.0 and 50 < found[1] < 100 and found[2:] == [0.0, 0.0]


def test_a_new_metric_is_scored_judged_and_tells_examples_apart(monkeypatch):
    monkeypatch.setitem(METRICS, "shared", SHARED)
    config = EvalConfig(metrics=["shared", "exact_match"], base_prompt={"examples": 2})
    scores = evaluate_outputs(["ab", "cd"], ["ab", "ce"], config.metrics)
    assert scores["shared_characters"].rows.tolist() == [5.0, 2.5] and scores["shared_characters"].best == 5.0
    judged = verdict(evaluate_outputs(["b", "d"], ["ab", "ce"], config.metrics), scores)
    assert "shared_characters 1.2 -> 3.8" in judged.sentence
    assert key_for_metrics(config.metrics)(Record((Message("user", "?"), Message("assistant", "ab")), "a:1")) == "a"


def test_evaluate_outputs_gives_means_intervals_and_rows():
    outputs = ["yes", "no", "yes", "no"]
    scores = evaluate_outputs(outputs, ["yes"] * 4, [metric_config("exact_match"), metric_config("chrf")])
    assert list(scores) == ["exact_match", "chrf"]
    exact = scores["exact_match"]
    assert (exact.value, exact.count, exact.best) == (0.5, 4, 1.0)
    assert exact.low < 0.5 < exact.high
    assert scores["chrf"].best == 100.0
    assert row_scores(scores, 1) == {"exact_match": 0.0, "chrf": scores["chrf"].rows[1]}
    written = json.loads(json.dumps(scores_as_json(scores, 17.5)))
    assert written["exact_match"] == 0.5 and written["perplexity_general"] == 17.5
    assert written["intervals"]["exact_match"] == [exact.low, exact.high]


def test_evaluate_outputs_refuses_unequal_lengths_and_no_rows():
    with pytest.raises(DataError, match="1 outputs"):
        evaluate_outputs(["a"], ["a", "b"], [metric_config("exact_match")])
    with pytest.raises(DataError, match="no held-out rows"):
        evaluate_outputs([], [], [metric_config("exact_match")])


def test_check_references_lists_every_reference_no_output_could_match():
    metrics = [
        metric_config({"kind": "json_schema", "schema": SCHEMA}),
        metric_config({"kind": "json_field_chrf", "field": "topic"}),
    ]
    references = ['{"topic": "history"}', '{"topic": "cooking"}', "{}", '{"topic": 3}']
    with pytest.raises(DataError) as caught:
        check_references(references, metrics, sources=[f"eval.jsonl:{line}" for line in (1, 2, 3, 4)])
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"eval.jsonl:{line}" for line in (2, 3, 4, 3, 4)]
    assert "'schema_valid' needs a reference that is one JSON value valid against the schema" in lines[0]
    assert "text in the field 'topic'" in lines[3] and "'{}'" in lines[3]


def test_check_references_shows_twenty():
    with pytest.raises(DataError, match=r"\+5 more") as caught:
        check_references(["no"] * 25, [metric_config({"kind": "json_field_equals", "field": "topic"})])
    assert "reference 0 (counting from 0)" in str(caught.value)


@pytest.mark.parametrize("kind, package", [("chrf", "sacrebleu"), ("json_schema", "jsonschema")])
def test_missing_package_says_what_to_install(monkeypatch, kind, package):
    monkeypatch.setitem(sys.modules, package, None)
    metric = {"kind": kind, "schema": {}} if kind == "json_schema" else {"kind": kind}
    with pytest.raises(ConfigError, match=rf"{package}: pip install 'lorakit\[eval\]'"):
        rows(metric, ["{}"])


def test_every_metric_gives_the_best_score_to_the_reference_itself():
    parameters = {
        "json_schema": {"schema": SCHEMA},
        "json_field_equals": {"field": "topic"},
        "json_field_chrf": {"field": "topic"},
    }
    for kind, metric in METRICS.items():
        settings = metric_config({"kind": kind, **parameters.get(kind, {})})
        found = metric.rows(settings, ['{"topic": "history"}'] * 3, ['{"topic": "history"}'] * 3)
        assert found.dtype == np.float64 and found.tolist() == [metric.best] * 3
