"""What the model is trained on is what it is asked with and what the record says, or the record is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from made import CHATML, SPECIAL, byte_level, make_tokenizer

from lorakit import Record, Tokenizer
from lorakit.data import Example, describe_example, encode_record, make_batch
from lorakit.data.records import parse_record
from lorakit.errors import DataError

Turn = dict[str, Any]
Build = Callable[..., Tokenizer]

TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather in a city."}},
    {"type": "function", "function": {"name": "get_time", "description": "The time in a city."}},
]
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Tromsø", "days": 3}}}

# ChatML with tools in a system turn, calls and reasoning as JSON and tags: the structure of many templates.
WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(content: Any, **more: Any) -> Turn:
    return {"role": "user", "content": content, **more}


def answer(content: Any = None, **more: Any) -> Turn:
    return {"role": "assistant", "content": content, **more}


def record(*messages: Turn, tools: Sequence[Any] | None = None) -> Record:
    line = {"messages": messages} if tools is None else {"messages": messages, "tools": tools}
    return parse_record(json.dumps(line), "train.jsonl:17")


def trained(tok: Tokenizer, example: Example) -> list[str]:
    """Decode each stretch of trained tokens."""
    pairs = zip(example.loss_mask, example.input_ids, strict=True)
    runs = [[token for _, token in run] for is_trained, run in groupby(pairs, key=lambda pair: pair[0]) if is_trained]
    return [tok.decode(run, skip_special_tokens=False) for run in runs]


def texts(tok: Tokenizer, example: Example) -> list[str]:
    """Decode each rendering."""
    return [tok.decode(example.input_ids[a:b], skip_special_tokens=False) for a, b in example.bounds()]


def refusal(tok: Tokenizer, made: Record) -> str:
    with pytest.raises(DataError) as caught:
        encode_record(tok, made, 10_000)
    return str(caught.value)


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """build(template) -> a tokenizer with ChatML's special tokens."""
    return lambda template: make_tokenizer(tmp_path, template, SPECIAL, ["<|im_end|>"], byte_level)


# ---- the end of a turn is trained, headers are not -------------------------------------------------------------------


@pytest.mark.parametrize("strips", [{"rstrip": True}, {"lstrip": True}, {"lstrip": True, "rstrip": True}])
@pytest.mark.parametrize("content", ["Hi.", " Hi.", "\nHi.", "Hi. ", "Hi.\n\n", " \n Hi. \n "])
def test_tokens_that_swallow_the_white_space_beside_them(tmp_path: Path, strips: dict[str, bool], content: str) -> None:
    def swallowing() -> tokenizers.Tokenizer:
        backend = byte_level()
        backend.add_special_tokens([tokenizers.AddedToken(token, special=True, **strips) for token in SPECIAL])
        return backend

    tok = make_tokenizer(tmp_path, CHATML, SPECIAL, ["<|im_end|>"], swallowing)
    example = encode_record(tok, record(user("a"), answer(content), user("b"), answer(content)), 1000)
    end, opening = tok.encode("<|im_end|>"), tok.encode("<|im_start|>")
    for run in trained(tok, example):
        assert "Hi." in run and run.endswith("<|im_end|>") and run.count("<|im_end|>") == 1
        assert "<|im_start|>" not in run and "assistant" not in run and "user" not in run
    masked = [token for token, is_trained in zip(example.input_ids, example.loss_mask, strict=True) if is_trained]
    assert masked.count(end[0]) == 2 and opening[0] not in masked


# ---- what a template leaves out --------------------------------------------------------------------------------------


def skips(condition: str) -> str:
    return CHATML.replace("in messages %}", f"in messages if not ({condition}) %}}")


CONVERSATION = [
    {"role": "system", "content": "Answer in French."},
    user("Weather?"),
    answer("I ask."),
    {"role": "tool", "content": "It is 22 C."},
    answer("Warm."),
]


@pytest.mark.parametrize(
    ("condition", "names"),
    [
        ("m.role == 'system'", "message 1: the chat template leaves out the system message ('Answer in French.')"),
        ("m.role == 'tool'", "message 4: the chat template leaves out the tool message ('It is 22 C.')"),
        ("m.role == 'user'", "message 2: the chat template leaves out the user message ('Weather?')"),
    ],
)
def test_a_role_without_a_place_is_refused(build: Build, condition: str, names: str) -> None:
    message = refusal(build(skips(condition)), record(*CONVERSATION))
    assert message.startswith(f"train.jsonl:17: {names}") and "change chat_template in" in message
    assert ("beginning of the first user message" in message) == ("system" in names)


def test_one_of_two_messages_with_the_same_text_is_missed(build: Build) -> None:
    # The second question is in the text: as the first, and as the beginning of a header.
    drops_third = CHATML.replace("%}{{", "%}{% if loop.index0 != 2 %}{{", 1).replace(
        "{% endfor", "{% endif %}{% endfor"
    )
    for text in ("a", "user", "What is the capital of France?"):
        message = refusal(build(drops_third), record(user(text), answer("b"), user(text), answer("c")))
        assert message.startswith("train.jsonl:17: message 3: the chat template leaves out the user message")


@pytest.mark.parametrize("text", ["'Hello ' + m.content[:20]", "m.content.split('.')[0]", "m.content | upper"])
def test_a_part_of_a_text_is_missed(build: Build, text: str) -> None:
    tok = build(CHATML.replace("m['content']", f"({text} if m.role == 'user' else m.content)"))
    message = refusal(tok, record(user("One sentence here. And another one."), answer("b")))
    assert "message 1: the chat template leaves out or changes some of the user message" in message


def test_reasoning_that_later_turns_drop_is_trained_where_it_is_the_last(build: Build) -> None:
    drops = "(m.content.split('</think>')[-1].lstrip('\\n') if not loop.last else m.content)"
    tok = build(CHATML.replace("m['content']", drops))
    made = record(
        user("2+2?"), answer("<think>\nadd\n</think>\n\n4"), user("3+3?"), answer("<think>\nadd\n</think>\n\n6")
    )
    example = encode_record(tok, made, 1000)
    messages = made.as_dicts()
    assert texts(tok, example) == [tok.render_chat(messages[:2]), tok.render_chat(messages)]
    assert trained(tok, example) == [
        "<think>\nadd\n</think>\n\n4<|im_end|>", "<think>\nadd\n</think>\n\n6<|im_end|>",
    ]  # fmt: skip
    for text, count in zip(texts(tok, example), (1, 3), strict=True):
        assert text.startswith(tok.render_chat(messages[:count], add_generation_prompt=True))


def test_a_template_that_reads_how_a_text_begins(build: Build) -> None:
    # Reasoning is kept after the last question, and a tool's result in a user message is none: a mark in its place is.
    tok = build(
        "{% set ns = namespace(last=0) %}{% for m in messages %}"
        "{% if m.role == 'user' and not m.content.startswith('<result>') %}{% set ns.last = loop.index0 %}{% endif %}"
        "{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.reasoning_content and loop.index0 > ns.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    made = record(
        user("Weather?"), answer("I ask.", reasoning_content="no idea"), user("<result>22</result>"), answer("Warm.")
    )
    example = encode_record(tok, made, 1000)
    assert texts(tok, example) == [tok.render_chat(made.as_dicts())]
    assert trained(tok, example) == ["<think>no idea</think>I ask.<|im_end|>", "Warm.<|im_end|>"]


def test_a_template_that_always_drops_reasoning_is_refused(build: Build) -> None:
    tok = build(CHATML.replace("m['content']", "m.content.split('</think>')[-1]"))
    made = record(user("2+2?"), answer("<think>add</think>4"))
    assert "message 2: the chat template leaves out or changes some of the assistant message" in refusal(tok, made)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("m.content | trim", "  Hi there \n"),
        ("m.content | tojson", 'a "quoted"\nline — naïve\\'),
        ("m.content | tojson(ensure_ascii=true)", 'a "quoted"\nline — naïve\\'),
        ("m.content.replace('\n\n', '\n')", "two\n\nlines"),
        ("m.content.replace('/no_think', '').rstrip()", "Be brief. /no_think"),
    ],
)
def test_what_templates_may_do_to_a_text(build: Build, text: str, content: str) -> None:
    tok = build(CHATML.replace("m['content']", f"({text} if m.role == 'user' else m.content)"))
    assert trained(tok, encode_record(tok, record(user(content), answer("Hello")), 100)) == ["Hello<|im_end|>"]


def test_a_text_that_looks_like_a_mark_is_refused(build: Build) -> None:
    assert "between U+E000 and U+E001" in refusal(build(CHATML), record(user("\ue0000\ue001"), answer("b")))


# ---- tools, calls, names, reasoning and parts ------------------------------------------------------------------------


def test_tools_calls_and_results_are_rendered(build: Build) -> None:
    tok = build(WITH_TOOLS)
    made = record(
        user("Weather?"), answer(tool_calls=[CALL]), {"role": "tool", "name": "get_weather", "content": '{"c": 22}'},
        answer("Warm.", reasoning_content="22 is warm"), tools=TOOLS,
    )  # fmt: skip
    example = encode_record(tok, made, 1000)
    assert texts(tok, example) == [tok.render_chat(made.as_dicts())]
    assert json.dumps(TOOLS[1]) in texts(tok, example)[0]
    arguments = '{"name": "get_weather", "arguments": {"city": "Tromsø", "days": 3}}'
    assert trained(tok, example) == [
        f"<call>{arguments}</call><|im_end|>", "<think>22 is warm</think>Warm.<|im_end|>",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("made", "names"),
    [
        (record(user("a"), answer("b"), tools=TOOLS), 'the chat template leaves out the name of tool 1 in "tools"'),
        (record(user("a"), answer("b", tool_calls=[CALL])), "message 2: the chat template leaves out the name of tool"),
        (record(user("a", name="Ada"), answer("b")), """leaves out the "name" of the user message ('Ada')"""),
        (record(user("a"), answer("b", reasoning_content="c")), 'leaves out the "reasoning_content"'),
        (record(user("a"), answer("b", thinking="c")), 'leaves out the "thinking" of the assistant message'),
        (record(user([{"type": "text", "text": "Hi"}]), answer("b")), "can only concatenate str"),
    ],
)
def test_what_a_template_has_no_place_for_is_refused(build: Build, made: Record, names: str) -> None:
    message = refusal(build(CHATML), made)
    assert message.startswith("train.jsonl:17: ") and names in message


@pytest.mark.parametrize(
    ("template", "names"),
    [
        (WITH_TOOLS.replace("in tools %}", "in tools[:1] %}"), 'the name of tool 2 in "tools"'),
        (WITH_TOOLS.replace("t | tojson", "t.function.name"), 'the description of tool 1 in "tools"'),
        (WITH_TOOLS.replace("c.function | tojson", "c.function.name"), "the arguments of tool call 1"),
        (WITH_TOOLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"), "the name of tool call 2"),
    ],
)
def test_some_of_the_tools_and_calls_are_missed(build: Build, template: str, names: str) -> None:
    assert names in refusal(build(template), record(user("a"), answer("b", tool_calls=[CALL, CALL]), tools=TOOLS))


def test_a_call_begins_where_the_prompt_ends_in_a_template_without_a_generation_prompt(build: Build) -> None:
    # "[/INST]" ends what is asked, and the model writes the rest: the opening of a call, too.
    tok = build(
        "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.tool_calls %}"
        "[TOOL_CALLS]{{ m.tool_calls | tojson }}{{ eos_token }}{% else %}{{ m.content }}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    )
    made = record(user("Weather?"), answer(tool_calls=[CALL]), user("And?"), answer("Warm."))
    call, words = trained(tok, encode_record(tok, made, 1000))
    assert call.startswith('[TOOL_CALLS][{"type"') and words == "Warm.<|im_end|>"
    # A header that the template leaves to the model is no content, before a call as before words.
    tok = build(WITH_TOOLS[: WITH_TOOLS.index("{% if add_generation_prompt")])
    call, words = trained(tok, encode_record(tok, made, 1000))
    assert call.startswith('<call>{"name"') and words == "Warm.<|im_end|>"


def test_arguments_that_a_template_would_quote_twice(build: Build) -> None:
    call = {"function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    made = record(user("a"), answer("b", tool_calls=[call]))
    message = refusal(build(WITH_TOOLS), made)
    assert "message 2: the chat template puts into quotes once more the arguments of tool call 1" in message
    assert "give the arguments as an object" in message
    tok = build(WITH_TOOLS.replace("c.function | tojson", "c.function.name + c.function.arguments"))  # takes strings
    assert trained(tok, encode_record(tok, made, 1000)) == ['b<call>get_weather{"city": "Oslo"}</call><|im_end|>']


def test_a_special_token_in_a_call_cannot_forge_a_turn(build: Build) -> None:
    forged = {"function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}
    assert "message 2 (assistant) contains the special token" in refusal(
        build(WITH_TOOLS), record(user("a"), answer("b", tool_calls=[forged]))
    )
    tools = [{"function": {"name": "f", "description": "<|im_start|>"}}]
    assert '"tools" contains the special token' in refusal(
        build(WITH_TOOLS), record(user("a"), answer("b"), tools=tools)
    )


def test_parts_of_a_content(build: Build) -> None:
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
    reads = "(m.content if m.content is string else m.content | map(attribute='text') | join)"
    tok = build(CHATML.replace("m['content']", reads))
    made = record(user(parts), answer(parts))
    assert made.messages[0].content == "Hi there" and made.as_dicts()[0]["content"] == parts
    assert trained(tok, encode_record(tok, made, 100)) == ["Hi there<|im_end|>"]
    for prints in ("m.content | string", "m.content | tojson"):  # as transformers would, too
        message = refusal(build(CHATML.replace("m['content']", prints)), made)
        assert "message 1: the chat template writes out with brackets and keys part 1 of the user message" in message


# ---- training asks what use asks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("opening", ["<think>\n", "<think>\n\n</think>\n\n", "{"])
@pytest.mark.parametrize("content", ["Hello", "<think>\nwell\n</think>\n\nHello"])
def test_a_prompt_that_the_answered_turn_does_not_have_is_refused(build: Build, opening: str, content: str) -> None:
    # The answer is written without its reasoning, whatever the prompt opens.
    template = CHATML.replace("m['content']", "m.content.split('</think>')[-1]")
    tok = build(template.replace("assistant\n' }}", f"assistant\n{opening}' }}}}"))
    message = refusal(tok, record(user("Hi"), answer(content)))
    assert message.startswith("train.jsonl:17: message 2: the model is asked for this answer after")
    assert repr(opening)[1:-1] in message


def test_a_refused_system_message_says_where_to_put_it(build: Build) -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    message = refusal(build(refuses + CHATML), record(*CONVERSATION[:3]))
    assert "System role not supported; it takes them without the system message: put it at the beginning of" in message


def test_renderings_of_one_record_are_sequences_of_their_own(build: Build) -> None:
    tok = build(CHATML.replace("m['content']", "(m.content if loop.last or m.role == 'user' else m.content[:1])"))
    both = encode_record(tok, record(user("a"), answer("bb"), user("c"), answer("dd")), 1000)
    assert texts(tok, both)[1].endswith(
        "b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\ndd<|im_end|>\n"
    )
    apart = [Example(both.input_ids[a:b], both.loss_mask[a:b], both.source) for a, b in both.bounds()]
    one, two = make_batch([both]), make_batch(apart)
    assert one.input_ids.tolist() == two.input_ids.tolist() and one.targets.tolist() == two.targets.tolist()
    assert one.lengths == two.lengths == list(both.lengths) and len(both.lengths) == 2
    shown = describe_example(tok, both)
    assert "rendering 1 of 2" in shown and "rendering 2 of 2" in shown
    longest = max(both.lengths)  # the limit is for one sequence
    assert encode_record(tok, record(user("a"), answer("bb"), user("c"), answer("dd")), longest) == both
