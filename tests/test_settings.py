"""Settings: strict, immutable, and every problem in one error, nested ones under their dotted keys."""

from __future__ import annotations

import pytest
from pydantic import Field, field_validator, model_validator

from lorakit.errors import ConfigError
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
