"""The base's strong prompt and the tuned model's short one, from the same record."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data import Message, Record
from lorakit.errors import DataError
from lorakit.evaluation.metrics import metric_config
from lorakit.evaluation.prompting import choose_examples, key_for_metrics, prompted_messages, split_record


def record(question, answer, system="Answer as JSON.", source="train.jsonl:1"):
    turns = [Message("system", system)] if system else []
    return Record((*turns, Message("user", question), Message("assistant", answer)), source, {})


QUESTION = record("Who won?", '{"topic": "sports"}', source="eval.jsonl:3")


def test_split_gives_the_short_prompt_and_the_reference():
    prompt, reference = split_record(QUESTION)
    assert prompt == [{"role": "system", "content": "Answer as JSON."}, {"role": "user", "content": "Who won?"}]
    assert reference == '{"topic": "sports"}'


def test_split_of_a_longer_conversation_asks_for_its_last_answer():
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
    prompt, reference = split_record(Record(turns, "eval.jsonl:1", {}))
    assert [message["content"] for message in prompt] == ["a", "b", "c"] and reference == "d"


@pytest.mark.parametrize(
    "messages, words",
    [
        ((Message("user", "a"), Message("assistant", "b"), Message("user", "c")), "last message is from 'user'"),
        ((Message("system", "a"), Message("assistant", "b")), "no 'user' message"),
    ],
)
def test_records_that_cannot_be_asked_are_refused(messages, words):
    with pytest.raises(DataError, match=f"eval.jsonl:9: .*{words}"):
        split_record(Record(messages, "eval.jsonl:9", {}))


def test_strong_prompt_has_instructions_then_examples_then_the_question():
    examples = [record("When was it?", '{"topic": "history"}', system="Something else.")]
    assert prompted_messages(QUESTION.messages, "Use this schema.", examples) == [
        {"role": "system", "content": "Use this schema."},
        {"role": "user", "content": "When was it?"},
        {"role": "assistant", "content": '{"topic": "history"}'},
        {"role": "user", "content": "Who won?"},
    ]


def test_without_instructions_the_record_keeps_its_system_prompt():
    assert prompted_messages(QUESTION.messages, None)[0] == {"role": "system", "content": "Answer as JSON."}
    assert prompted_messages(QUESTION.messages[1:], None)[0]["role"] == "user"


@given(st.lists(st.text(), max_size=3))
def test_the_answer_is_never_in_the_prompt(turns):
    messages = [Message("user", text) for text in [*turns, "question"]]
    with_answer, without = [*messages, Message("assistant", "SECRET")], messages
    assert prompted_messages(with_answer, "Instructions.") == prompted_messages(without, "Instructions.")


def test_examples_cover_topics_before_repeating_one():
    topics = ["sports"] * 5 + ["history"] * 3 + ["food"] * 2
    records = [record(f"question {i}", json.dumps({"topic": topic, "n": i})) for i, topic in enumerate(topics)]
    key = key_for_metrics([metric_config("chrf"), metric_config({"kind": "json_field_equals", "field": "topic"})])
    found = [json.loads(split_record(example)[1])["topic"] for example in choose_examples(records, 5, key)]
    assert found == ["sports", "history", "food", "sports", "history"]
    assert choose_examples(records, 5, key) == choose_examples(list(records), 5, key)


def test_examples_are_typical_of_their_topic():
    records = [record("x" * length, '{"topic": "a"}') for length in (1, 300, 40, 50, 60)]
    assert choose_examples(records, 1)[0] is records[3]


def test_examples_run_out():
    assert len(choose_examples([record("a", "b"), record("c", "b")], 4)) == 2
    assert choose_examples([], 4) == []
    assert choose_examples([record("a", "b")], 0) == []


@given(st.lists(st.sampled_from("abc"), max_size=12), st.integers(0, 12))
def test_examples_are_distinct_training_records(answers, count):
    records = [record(f"question {i}", answer) for i, answer in enumerate(answers)]
    chosen = choose_examples(records, count)
    assert len(chosen) == min(count, len(records)) == len({id(example) for example in chosen})
    assert len({split_record(example)[1] for example in chosen}) == min(count, len(set(answers)))


def test_key_survives_answers_that_are_not_what_the_metric_needs():
    key = key_for_metrics([metric_config({"kind": "json_field_equals", "field": "topic"})])
    answers = ['{"topic": ["a", {"b": 1}]}', "not JSON", "{}"]
    assert len(choose_examples([record("q", answer) for answer in answers], 3, key)) == 3


def test_no_key_without_a_field_metric():
    assert (
        key_for_metrics([metric_config("chrf"), metric_config({"kind": "json_field_chrf", "field": "answer"})]) is None
    )


TOOLS = [{"type": "function", "function": {"name": "get_weather"}}]
CALL = {"function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}


def test_both_prompts_keep_the_tools_and_the_calls():
    calls = Message("assistant", "", {"content": None, "tool_calls": [CALL]})
    turns = (Message("user", "Weather?"), calls, Message("tool", "22"), Message("assistant", "Warm."))
    asked = Record(turns, "eval.jsonl:1", {"tools": TOOLS})
    short, reference = split_record(asked)
    assert reference == "Warm." and short.tools == TOOLS
    assert short[1] == {"role": "assistant", "content": None, "tool_calls": [CALL]}
    strong = prompted_messages(asked, "Be brief.", [asked])
    assert strong.tools == TOOLS and strong[-3:] == short and strong[2] == short[1]
    assert prompted_messages(turns, None).tools is None


def test_a_call_is_no_answer_to_compare_with():
    calls = Message("assistant", "", {"content": None, "tool_calls": [CALL]})
    with pytest.raises(DataError, match=r"eval\.jsonl:9: the last answer calls a tool"):
        split_record(Record((Message("user", "a"), calls), "eval.jsonl:9", {}))
