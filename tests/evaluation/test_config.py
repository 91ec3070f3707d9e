"""Recipes that are right become settings and back; recipes that are wrong are told what is."""

import pytest
import yaml

from lorakit.errors import ConfigError, DataError
from lorakit.evaluation.config import BasePrompt, EvalConfig, general_text
from lorakit.evaluation.metrics import FieldMetric, SchemaMetric

RECIPE = """
metrics:
  - exact_match
  - {kind: json_schema, schema: {type: object}}
  - {kind: json_field_equals, field: topic}
  - {kind: json_field_chrf, field: answer, name: answer_similarity}
base_prompt:
  instructions: Answer with one JSON object.
  examples: 3
limit: 50
"""


def test_recipe_becomes_settings():
    config = EvalConfig(**yaml.safe_load(RECIPE))
    assert [metric.label for metric in config.metrics] == [
        "exact_match",
        "schema_valid",
        "topic_accuracy",
        "answer_similarity",
    ]
    assert isinstance(config.metrics[1], SchemaMetric) and config.metrics[1].load() == {"type": "object"}
    assert isinstance(config.metrics[2], FieldMetric) and config.metrics[2].field == "topic"
    assert config.base_prompt.text() == "Answer with one JSON object."


def test_dumped_settings_load_again():
    config = EvalConfig(**yaml.safe_load(RECIPE))
    dumped = config.model_dump(mode="json")
    assert dumped["metrics"][1]["schema"] == {"type": "object"}
    assert EvalConfig(**yaml.safe_load(yaml.safe_dump(dumped))) == config


def test_defaults_are_exact_match_and_chrf():
    assert [metric.label for metric in EvalConfig().metrics] == ["exact_match", "chrf"]


@pytest.mark.parametrize(
    "values, key, message",
    [
        ({"metrics": ["exact_mach"]}, "metrics.0.kind", "did you mean 'exact_match'"),
        ({"metrics": ["chrf", {"kind": "json_field_equals"}]}, "metrics.1.field", "required"),
        ({"metrics": [{"kind": "chrf", "feild": "x"}]}, "metrics.0.feild", "unknown key"),
        ({"metrics": [{"kind": "json_schema"}]}, "metrics.0", "either 'schema'"),
        ({"metrics": [{"kind": "json_schema", "schema": {}, "schema_file": "x"}]}, "metrics.0", "either 'schema'"),
        ({"metrics": [{"kind": "chrf", "name": "intervals"}]}, "metrics.0.name", "taken"),
        ({"metrics": [{"field": "topic"}]}, "metrics.0", "with 'kind'"),
        ({"metrics": [3]}, "metrics.0", "with 'kind'"),
        ({"metrics": []}, "metrics", "at least 1"),
        ({"metrics": ["chrf", "chrf"]}, "", "two metrics are called 'chrf'"),
        ({"base_prompt": {"instructions": "a", "instructions_file": "b"}}, "base_prompt", "not both"),
        ({"batch_size": 0}, "batch_size", "greater than or equal to 1"),
    ],
)
def test_mistakes_are_named(values, key, message):
    with pytest.raises(ConfigError) as caught:
        EvalConfig(**values)
    [(found_key, found_message)] = caught.value.problems
    assert found_key == key and message in found_message


def test_settings_of_the_wrong_class_are_refused():
    with pytest.raises(ConfigError, match="takes a MetricConfig, not a FieldMetric"):
        FieldMetric(kind="chrf", field="answer")


def test_instructions_from_a_file(tmp_path):
    path = tmp_path / "instructions.txt"
    with pytest.raises(ConfigError, match=r"instructions\.txt"):
        BasePrompt(instructions_file=path).text()
    path.write_text("  \n")
    with pytest.raises(ConfigError, match="empty"):
        BasePrompt(instructions_file=path).text()
    path.write_text("Be brief.\n")
    assert BasePrompt(instructions_file=path).text() == "Be brief."
    assert BasePrompt().text() is None


def test_packaged_general_text_is_plain_and_long_enough():
    text = general_text()
    assert text.isascii() and 1000 <= len(text.split()) <= 1500
    assert "\n\n" in text and "def lower_bound" in text


def test_general_text_from_a_file(tmp_path):
    path = tmp_path / "own.txt"
    with pytest.raises(DataError, match=r"own\.txt"):
        general_text(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"own\.txt"):
        general_text(path)
    path.write_text(" \n")
    with pytest.raises(DataError, match="empty"):
        general_text(path)
    path.write_text("Some words of prose.\n")
    assert general_text(path) == "Some words of prose.\n"


def test_code_in_the_general_text_does_what_the_text_says():
    source = general_text().split("\n\n")
    code = next(block for block in source if "def lower_bound" in block)
    scope: dict = {}
    exec("\n".join(line[4:] for line in code.splitlines()), scope)
    assert [scope["lower_bound"]([1, 3, 3, 5], wanted) for wanted in (0, 3, 4, 6)] == [0, 1, 3, 4]
