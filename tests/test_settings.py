"""Settings: strict, immutable, and every problem in one error, nested ones under their dotted keys."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import Field, field_validator, model_validator

from lorakit import LoraConfig, TrainConfig
from lorakit.errors import ConfigError
from lorakit.other_tools import OTHER_TOOLS, other_tools_hint
from lorakit.runs.recipe import Recipe
from lorakit.settings import Settings


class Inner(Settings):
    size: int = Field(1, ge=1)
    ratio: float = 0.5

    @field_validator("ratio")
    @classmethod
    def _not_a_third(cls, value: float) -> float:
        if value == 0.3:
            raise ValueError("must not be 0.3")
        return value


class Outer(Settings):
    name: str
    inner: Inner = Inner()
    many: list[Inner] = Field(default_factory=list)
    table: dict[str, int] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _not_hidden(self) -> Outer:
        if self.name == "hidden":
            raise ValueError("hidden needs more")
        return self


def problems(**values: object) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        Outer(**values)
    message = str(caught.value)
    assert message.startswith("Outer is not valid:\n")
    assert message.count("\n") == len(caught.value.problems)
    return dict(caught.value.problems)


def test_what_is_right_is_kept() -> None:
    outer = Outer(name="x", inner={"size": 3}, many=[{"size": 2}, Inner()])
    assert (outer.inner.size, outer.many[0].size, outer.many[1].size) == (3, 2, 1)
    assert Outer(**outer.model_dump()) == outer


def test_all_problems_come_at_once() -> None:
    found = problems(inner={"size": 0, "raito": 1, "ratio": 0.3}, many=[{}, {"size": "many"}], table={"a": []}, nmae=1)
    assert found.keys() == {"name", "inner.size", "inner.raito", "inner.ratio", "many.1.size", "table.a", "nmae"}
    assert found["name"] == "is required"
    assert found["nmae"] == "unknown key; did you mean 'name'?"
    assert found["inner.raito"] == "unknown key; did you mean 'ratio'?"
    assert found["inner.ratio"] == "must not be 0.3"
    assert found["inner.size"] == "input should be greater than or equal to 1 (got 0)"
    assert "(got 'many')" in found["many.1.size"]


def test_a_problem_of_the_whole_has_no_key() -> None:
    assert problems(name="hidden") == {"": "hidden needs more"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), ".inf", "nan"])
def test_numbers_are_finite(value: object) -> None:
    assert problems(name="x", inner={"ratio": value}).keys() == {"inner.ratio"}


def test_settings_cannot_be_changed() -> None:
    outer = Outer(name="x")
    with pytest.raises(ValueError, match="frozen"):
        outer.name = "y"
    assert outer.name == "x"


def test_defaults_are_not_shared() -> None:
    Outer(name="x").many.append(Inner())
    assert Outer(name="y").many == []


# ---- keys of other tools ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [key for key, meant in OTHER_TOOLS.items() if " " not in meant.partition(": ")[0]])
def test_what_a_hint_names_is_a_key_of_the_recipe(key: str) -> None:
    kind: Any = Recipe
    for part in OTHER_TOOLS[key].partition(": ")[0].split("."):
        annotation = kind.model_fields[part].annotation
        kind = next(
            (one for one in (annotation, *getattr(annotation, "__args__", ())) if hasattr(one, "model_fields")), None
        )


@pytest.mark.parametrize("key", OTHER_TOOLS)
def test_no_hint_is_for_a_key_that_exists(key: str) -> None:
    sections = (field.annotation for field in Recipe.model_fields.values())
    assert key not in Recipe.model_fields
    assert not any(key in getattr(section, "model_fields", {}) for section in sections)


def test_a_key_is_named_without_the_section_that_it_is_in() -> None:
    assert other_tools_hint("learning_rate", {"lr"}) == "; here it is called 'lr'"
    assert other_tools_hint("Learning_Rate", ()) == "; here it is called 'train.lr'"
    assert other_tools_hint("warmup_steps", ()) == "; here it is called 'train.warmup_ratio': a share of the steps"
    assert other_tools_hint("logging_steps", ()) == "; every step is logged"
    assert other_tools_hint("anything", ()) == ""


def test_in_python_too() -> None:
    with pytest.raises(
        ConfigError, match="gradient_accumulation_steps: unknown key; here it is called 'batch_size': all conv"
    ):
        TrainConfig(gradient_accumulation_steps=4)
    with pytest.raises(ConfigError, match="rank: unknown key; here it is called 'r'"):
        LoraConfig(rank=8)
