"""What counts as JSON, and when two values are the same."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.evaluation.strict_json import parse_json, same_json

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(values)
def test_whatever_json_writes_is_read_back(value):
    assert same_json(parse_json(f"\n {json.dumps(value)} \t"), value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "{} {}",
        '{"a": 1}\nHope this helps!',
        '```json\n{"a": 1}\n```',
        "{'a': 1}",
        '{"a": 1,}',
        "NaN",
        '{"a": Infinity}',
        "[-Infinity]",
        '{"a": 1, "a": 1}',
        '{"x": {"b": 1, "b": 2}}',
        "[" * 200_000,
        "1" * 10_000,
    ],
)
def test_everything_else_is_refused(text):
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize("first, second", [(1, 1.0), ({"a": 1, "b": 2}, {"b": 2, "a": 1}), (None, None), ([], [])])
def test_same(first, second):
    assert same_json(first, second)


@pytest.mark.parametrize(
    "first, second",
    [
        (1, True),
        (0, False),
        ("1", 1),
        (None, False),
        ([1], [True]),
        ({"a": 1}, {"a": 1, "b": 2}),
        ([1, 2], [2, 1]),
        ({}, []),
    ],
)
def test_not_the_same(first, second):
    assert not same_json(first, second)
    assert not same_json(second, first)
