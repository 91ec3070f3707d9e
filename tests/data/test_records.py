"""Reading and writing conversations: every bad line is named, nothing is lost on the way to disk and back."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.data import Message, Record, iter_records, load_records, save_records
from lorakit.data.records import parse_record
from lorakit.errors import DataError, StorageError

GOOD = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}'


def write(folder: Path, *lines: str | bytes) -> Path:
    path = folder / "train.jsonl"
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
    return path


def one_message(**message: Any) -> str:
    return json.dumps({"messages": [message]})


def test_load_keeps_messages_source_and_extra_keys(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufeff" + GOOD, "", "  \r", GOOD[:-1] + ', "topic": "é\u2028", "n": [1]}\r', "")
    first, second = load_records(path)
    assert first == Record((Message("user", "Hi"), Message("assistant", "Hello")), "train.jsonl:1", {})
    assert second.source == "train.jsonl:4"
    assert second.extra == {"topic": "é\u2028", "n": [1]}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"messages": [}', "not valid JSON: Expecting value at character 15"),
        ("[1, 2]", 'expected an object with "messages", found a list'),
        ("null", "found null"),
        ('{"messages": [], "x": NaN}', "not valid JSON: NaN is not a JSON number"),
        ("[" * 100_000, "not valid JSON"),
        (b'{"messages": "\xff"}', "not valid UTF-8 at byte 15 of the line"),
        ("{}", '"messages" is missing; the object is empty'),
        ('{"message": []}', "did you mean 'messages' where it says 'message'?"),
        ('{"id": 3, "conversations": []}', 'found "id", "conversations"; did you mean \'messages\' where it says'),
        ('{"messages": {"role": "user"}}', '"messages" must be a list, found an object'),
        ('{"messages": []}', '"messages" is empty'),
        ('{"messages": ["Hi"]}', 'message 1 must be an object with "role" and "content", found a string'),
        (one_message(**{"from": "human", "value": "Hi"}), "did you mean 'role' where it says 'from'?"),
        (one_message(role="user", contents="Hi"), "did you mean 'content' where it says 'contents'?"),
        (one_message(role="user", content=3), '"content" must be a string, found a number'),
        (one_message(role="assistant", content=None), '"content" must be a string, found null'),
        (one_message(role="asistant", content="Hi"), 'unknown role "asistant"; expected one of system, user'),
        (one_message(role="asistant", content="Hi"), "did you mean 'assistant'?"),
        (one_message(role="gpt", content="Hi"), "did you mean 'assistant'?"),
        (one_message(role="User", content="Hi"), "did you mean 'user'?"),
        (one_message(role="assistant", content="Hi", weight=0), 'unknown key "weight"'),
        (one_message(role="user", content="Hi"), "there is no assistant turn"),
        (one_message(role="assistant", content=" \n"), "the assistant's content is empty"),
        (r'{"messages": [{"role": "assistant", "content": "\ud83d"}]}', "half of a surrogate pair"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: str | bytes, expected: str) -> None:
    path = write(tmp_path, GOOD, line, GOOD)
    with pytest.raises(DataError) as caught:
        load_records(path)
    assert str(caught.value).startswith("train.jsonl:2: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- what a message may hold besides its role and content ------------------------------------------------------------

CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Tromsø"}}}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}


def test_tools_calls_reasoning_and_parts_are_kept(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Wea"}, {"type": "text", "text": "ther?"}]
    messages = [
        {"role": "user", "content": parts, "name": "Ada"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "I ask."},
        {"role": "tool", "content": "22", "name": "get_weather", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "Warm.", "thinking": "22 is warm."},
    ]
    path = write(tmp_path, json.dumps({"messages": messages, "tools": [TOOL], "topic": "weather"}))
    (record,) = load_records(path)
    assert record.as_dicts() == messages and record.as_dicts().tools == record.tools == [TOOL]
    assert [message.content for message in record.messages] == ["Weather?", "", "22", "Warm."]
    save_records(tmp_path / "again.jsonl", [record])
    (again,) = load_records(tmp_path / "again.jsonl")
    assert (again.messages, again.extra) == (record.messages, record.extra)
    assert len({record.messages, again.messages}) == 1  # they hash


def test_keys_without_a_value_are_as_if_absent() -> None:
    message = {"role": "assistant", "content": "Hi", "tool_calls": None, "name": None, "function_call": None}
    assert parse_record(json.dumps({"messages": [message], "tools": None}), "a:1").messages == (
        Message("assistant", "Hi"),
    )
    calls = {"role": "assistant", "tool_calls": [CALL]}  # without a content, as some services write it
    assert parse_record(json.dumps({"messages": [calls]}), "a:1").as_dicts() == [{**calls, "content": None}]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "user", "content": [{"type": "image", "url": "x"}]}, 'part 1 of the content is "image"'),
        ({"role": "user", "content": ["Hi"]}, 'part 1 of the content is "a string"; lorakit trains on text alone'),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, 'must be {"type": "text", "text": a string}'),
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, '"tool_calls" belongs in an assistant\'s message'),
        ({"role": "user", "content": "a", "reasoning": "b"}, '"reasoning" belongs in an assistant\'s message'),
        ({"role": "assistant", "content": "a", "tool_calls": CALL}, '"tool_calls" must be a list of objects'),
        ({"role": "assistant", "content": "a", "tool_calls": [{"function": {}}]}, "tool call 1 must be an object with"),
        (
            {"role": "assistant", "content": "a", "tool_calls": [{"name": "f", "arguments": [1]}]},
            'the "arguments" of tool call 1 must be an object or a string',
        ),
        ({"role": "assistant", "content": "a", "thinking": "b", "reasoning": "c"}, "gives the reasoning twice"),
        ({"role": "assistant", "content": "a", "thinking": 3}, '"thinking" must be a string, found a number'),
        ({"role": "assistant", "content": None, "tool_calls": []}, '"content" must be a string, found null'),
        ({"role": "assistant", "content": "", "tool_calls": []}, "the assistant's content is empty"),
        ({"role": "user", "content": "a", "name": "\ud83d"}, "half of a surrogate pair"),
    ],
)
def test_what_a_message_may_not_hold(message: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_record(json.dumps({"messages": [message, {"role": "assistant", "content": "b"}]}), "a:1")
    assert str(caught.value).startswith("a:1: message 1") and expected in str(caught.value)


@pytest.mark.parametrize("tools", ["[]", {"name": "f"}, [["f"]], [TOOL, "f"]])
def test_tools_of_another_form_are_refused(tools: Any) -> None:
    messages = json.loads(GOOD)["messages"]
    with pytest.raises(DataError, match=r'^a:1: "tools" must be a list of objects'):
        parse_record(json.dumps({"messages": messages, "tools": tools}), "a:1")


@pytest.mark.parametrize(
    ("line", "key"),
    [
        (GOOD.replace('"content": "Hi"', '"content": "Hi", "content": "Ho"'), "content"),
        (GOOD.replace('"role": "user"', '"role": "user", "role": "system"'), "role"),
        (f'{GOOD[:-1]}, "messages": []}}', "messages"),
        (f'{GOOD[:-1]}, "topic": 1, "topic": 2}}', "topic"),
        (f'{GOOD[:-1]}, "tools": [{{"function": {{"name": "f", "x": {{"a": 1, "a": 1}}}}}}]}}', "a"),
        (f'{GOOD[:-1]}, "x": {{"": 1, "": 2}}}}', ""),
    ],
)
def test_a_repeated_key_is_refused_at_any_depth(tmp_path: Path, line: str, key: str) -> None:
    for read in (lambda: parse_record(line, "train.jsonl:2"), lambda: load_records(write(tmp_path, GOOD, line))):
        with pytest.raises(DataError, match=rf'^train\.jsonl:2: not valid JSON: an object repeats the key "{key}"$'):
            read()


def test_parse_record_reads_one_line_in_any_format() -> None:
    assert parse_record(GOOD, "a:1") == parse_record(GOOD.encode(), "a:1", "messages")
    with pytest.raises(DataError, match=r"^a:1: not valid JSON"):
        parse_record("{", "a:1")


def test_all_bad_lines_are_in_one_error(tmp_path: Path) -> None:
    path = write(tmp_path, *[GOOD, "{"] * 25)
    with pytest.raises(DataError) as caught:
        load_records(path)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:20]] == [f"train.jsonl:{number}" for number in range(2, 42, 2)]
    assert lines[20:] == ["(+5 more)"]


def test_streaming_yields_before_the_error(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, "{", GOOD)
    assert [record.source for record in islice(iter_records(path), 2)] == ["train.jsonl:1", "train.jsonl:3"]
    with pytest.raises(DataError, match=r"train\.jsonl:2"):
        list(iter_records(path))


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
def test_empty_file(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match=r"train.jsonl is empty"):
        load_records(write(tmp_path, content))


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    with pytest.raises(DataError, match=r"no file .*trian.jsonl; did you mean 'train.jsonl'\?"):
        load_records(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="its folder does not exist"):
        load_records(tmp_path / "nowhere" / "train.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        load_records(tmp_path)


def test_save_is_readable_utf8_and_atomic(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.jsonl"
    good = Record((Message("user", "Où ? 🙂"), Message("assistant", "Là.")), "a:1", {"topic": "é"})
    save_records(path, [good])
    before = path.read_bytes()
    messages = '[{"role": "user", "content": "Où ? 🙂"}, {"role": "assistant", "content": "Là."}]'
    assert before.decode() == f'{{"messages": {messages}, "topic": "é"}}\n'
    bad: list[Record] = [
        Record((Message("user", "no answer"),), "b:1"),
        Record((Message("asistant", "Hi"),), "b:2"),
        Record((Message("assistant", "\ud83d"),), "b:3"),
        Record(good.messages, "b:4", {"x": {1, 2}}),
        Record(good.messages, "b:5", {"x": float("nan")}),
        Record(good.messages, "b:6", {"messages": []}),
    ]
    for record in bad:
        with pytest.raises(DataError, match=record.source):
            save_records(path, [good, record])
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(StorageError):
        save_records(path / "below-a-file.jsonl", [good])


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner)
)
MESSAGES = st.lists(st.builds(Message, st.sampled_from(["system", "user", "tool"]), TEXT), max_size=3)
ANSWERS = st.builds(Message, st.just("assistant"), TEXT.filter(lambda text: text.strip()))
EXTRA = st.dictionaries(TEXT.filter(lambda key: key != "messages"), JSON, max_size=3)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(MESSAGES, ANSWERS, EXTRA), min_size=1, max_size=4))
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[list[Message], Message, dict[str, Any]]]
) -> None:
    path = tmp_path_factory.mktemp("records") / "all.jsonl"
    records = [
        Record((*messages, answer), f"all.jsonl:{number}", extra)
        for number, (messages, answer, extra) in enumerate(drawn, start=1)
    ]
    save_records(path, records)
    assert load_records(path) == records
