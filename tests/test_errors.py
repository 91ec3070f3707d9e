"""The errors' family: one base class, the builtin ones beside it, and the nearest right word."""

from __future__ import annotations

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit import errors
from lorakit.errors import ConfigError, LorakitError, StorageError, did_you_mean, first_few, listing

CLASSES = [item for _, item in inspect.getmembers(errors, inspect.isclass) if issubclass(item, Exception)]


@pytest.mark.parametrize("error", CLASSES)
def test_every_error_is_lorakits_and_keeps_its_message(error: type[Exception]) -> None:
    with pytest.raises(LorakitError, match="what is wrong") as caught:
        raise error("what is wrong")
    assert str(caught.value) == "what is wrong"


def test_builtin_handlers_work_too() -> None:
    with pytest.raises(ValueError):
        raise ConfigError("x")
    with pytest.raises(OSError):
        raise StorageError("x")


def test_a_config_error_lists_its_problems() -> None:
    assert ConfigError("x").problems == []
    assert ConfigError("x", iter([("a.b", "is wrong")])).problems == [("a.b", "is wrong")]


@pytest.mark.parametrize(
    ("word", "expected"),
    [("q_porj", "; did you mean 'q_proj'?"), ("q_proj", "; did you mean 'q_proj'?"), ("xyzzy", ""), ("", "")],
)
def test_did_you_mean(word: str, expected: str) -> None:
    assert did_you_mean(word, {"q_proj": 1, "down": 2}) == expected
    assert did_you_mean(word, []) == ""


@given(st.text(max_size=20), st.lists(st.text(max_size=20), max_size=5))
def test_a_suggestion_is_always_one_of_the_options(word: str, options: list[str]) -> None:
    hint = did_you_mean(word, options)
    assert hint == "" or any(hint == f"; did you mean '{option}'?" for option in options)


def test_a_listing_spells_out_the_first_problems_and_counts_the_others() -> None:
    problems = [f"problem {number}" for number in range(25)]
    assert first_few(problems[:20]) == problems[:20]
    assert first_few(problems) == [*problems[:20], "(+5 more)"]
    assert first_few(problems, 3) == ["problem 0", "problem 1", "problem 2", "(+22 more)"]
    assert first_few(problems[:20], count=1020)[-1] == "(+1000 more)"
    assert f"it does not fit:{listing(problems[:3], 2)}" == "it does not fit:\n  problem 0\n  problem 1\n  (+1 more)"
    assert listing([]) == ""
