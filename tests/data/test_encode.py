"""The loss mask marks the assistant's words and the end of turn, nothing else, whatever the chat template."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made import byte_level_trimmed, newline_merging, sentencepiece
from rich.text import Text

from lorakit.data import Example, Message, Record, describe_example, encode_record, encode_records
from lorakit.errors import DataError
from lorakit.models.tokenizer.tokenizer import Tokenizer

MakeTokenizer = Callable[..., Tokenizer]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# No generation prompt of its own: "[/INST]" ends the user's turn. Roles must alternate; the system message joins the
# last user's, so a conversation renders differently up to each of its turns.
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}"
    "[INST] {% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}{{ m.content.strip() }} [/INST]"
    "{% else %}{{ ' ' + m.content.strip() + eos_token }}{% endif %}{% endfor %}"
)
# The last answer gets a reasoning block, empty where it has none; the reasoning of earlier answers is dropped.
QWEN3 = (
    "{%- for m in messages %}{%- if m.role != 'assistant' %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- else %}"
    "{%- set reasoning = '' %}{%- set content = m.content %}{%- if '</think>' in m.content %}"
    "{%- set reasoning = m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = m.content.split('</think>')[-1].lstrip('\n') %}{%- endif %}{%- if loop.last %}"
    "{{- '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# The generation prompt opens a reasoning block that finished turns do not have.
OPENS_REASONING = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
NO_GENERATION_PROMPT = CHATML[: CHATML.index("{% if")]
CHANGES_CONTENT = CHATML.replace("m['content']", "m['content'] | upper")
ENDS_NEVER = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
ENDS_ONCE = ENDS_NEVER + "{{ 'assistant: ' if add_generation_prompt else eos_token }}"
ENDS_USER_TURNS = "{% for m in messages %}{{ m.content + (eos_token if m.role == 'user' else '\n') }}{% endfor %}"
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture(scope="session")
def chatml(make_tokenizer: MakeTokenizer) -> Tokenizer:
    return make_tokenizer(CHATML, CHATML_TOKENS, ["<|im_end|>", "<|endoftext|>"], plain=["<think>", "</think>"])


@pytest.fixture(scope="session")
def llama3(make_tokenizer: MakeTokenizer) -> Tokenizer:
    return make_tokenizer(LLAMA3, LLAMA3_TOKENS, ["<|end_of_text|>", "<|eot_id|>"], build=byte_level_trimmed)


@pytest.fixture(scope="session")
def mistral(make_tokenizer: MakeTokenizer) -> Tokenizer:
    return make_tokenizer(MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], ["</s>"], build=sentencepiece)


def conversation(*turns: str, source: str = "train.jsonl:17") -> Record:
    """Build a record from "role: content" strings."""
    return Record(tuple(Message(*turn.split(": ", 1)) for turn in turns), source)


def trained_runs(tok: Tokenizer, example: Example) -> list[str]:
    """Decode each stretch of trained tokens."""
    pairs = zip(example.loss_mask, example.input_ids, strict=True)
    runs = [[token for _, token in run] for trained, run in groupby(pairs, key=lambda pair: pair[0]) if trained]
    return [tok.decode(run, skip_special_tokens=False) for run in runs]


def encoded_runs(tok: Tokenizer, record: Record) -> list[str]:
    return trained_runs(tok, encode_record(tok, record, max_length=100_000))


TWO_TURNS = conversation("system: Be brief.", "user: s", "assistant: s", "user: Why?", "assistant:  It is. 👩‍👩‍👧 \n")


def test_chatml_trains_contents_and_end_of_turn(chatml: Tokenizer) -> None:
    example = encode_record(chatml, TWO_TURNS, max_length=1000)
    assert trained_runs(chatml, example) == ["s<|im_end|>", " It is. 👩‍👩‍👧 \n<|im_end|>"]
    assert chatml.decode(example.input_ids, skip_special_tokens=False) == chatml.render_chat(TWO_TURNS.as_dicts())
    assert example.source == "train.jsonl:17"


def test_llama3_style_with_stripped_contents(llama3: Tokenizer) -> None:
    assert encoded_runs(llama3, TWO_TURNS) == ["s<|eot_id|>", "It is. 👩‍👩‍👧<|eot_id|>"]


def test_mistral_style_moves_the_system_message_and_strips(mistral: Tokenizer) -> None:
    example = encode_record(mistral, TWO_TURNS, 1000)
    # The space that the template puts before an answer is the model's to write.
    assert trained_runs(mistral, example) == [" s</s>", " It is. 👩‍👩‍👧</s>"]
    first, second = (example.input_ids[a:b] for a, b in example.bounds())
    # Both are asked with the system message before their own question, and the finished conversation has it nowhere.
    messages = TWO_TURNS.as_dicts()
    asked = [mistral.render_chat(messages[:count], add_generation_prompt=True) for count in (2, 4)]
    assert all("Be brief." in text for text in asked) and "Be brief." not in mistral.render_chat(messages)
    assert first == mistral.encode(asked[0] + " s</s>")
    assert second == mistral.encode(asked[1] + " It is. 👩‍👩‍👧</s>")


def test_qwen3_style_trains_the_reasoning_block_the_model_has_to_write(make_tokenizer: MakeTokenizer) -> None:
    tok = make_tokenizer(QWEN3, CHATML_TOKENS, ["<|im_end|>"], plain=["<think>", "</think>"])
    record = conversation("user: a", "assistant: <think>\nhm\n</think>\n\nyes", "user: b", "assistant: no")
    example = encode_record(tok, record, 1000)
    assert trained_runs(tok, example) == [
        "<think>\nhm\n</think>\n\nyes<|im_end|>", "<think>\n\n</think>\n\nno<|im_end|>",
    ]  # fmt: skip
    messages = record.as_dicts()
    texts = [tok.decode(example.input_ids[a:b], skip_special_tokens=False) for a, b in example.bounds()]
    assert texts == [tok.render_chat(messages[:2]), tok.render_chat(messages)]
    last = conversation("user: a", "assistant: <think>\nhm\n</think>\n\nyes")
    assert encoded_runs(tok, last) == ["<think>\nhm\n</think>\n\nyes<|im_end|>"]


def test_generation_prompt_that_finished_turns_do_not_have_is_refused(make_tokenizer: MakeTokenizer) -> None:
    tok = make_tokenizer(OPENS_REASONING, CHATML_TOKENS, ["<|im_end|>"])
    for answer in ("Hello", "<think>\nhm</think>Hello"):  # as text, that is what it begins with; as a turn, it does not
        record = conversation("user: Hi", f"assistant: {answer}x".replace("<think>\n", " <think>\n"))
        with pytest.raises(DataError, match=r"train.jsonl:17: message 2: the model is asked .*assistant\\n<think>"):
            encode_record(tok, record, 1000)
    # A record that goes on where the generation prompt ends is trained from there.
    record = conversation("user: Hi", "assistant: <think>\nhm</think>Hello")
    assert encoded_runs(tok, record) == ["hm</think>Hello<|im_end|>"]


def test_template_without_generation_prompt_does_not_train_the_header(make_tokenizer: MakeTokenizer) -> None:
    tok = make_tokenizer(NO_GENERATION_PROMPT, CHATML_TOKENS, ["<|im_end|>"])
    assert encoded_runs(tok, conversation("user: a", "assistant: b")) == ["b<|im_end|>"]


def test_conversation_that_begins_with_the_assistant(chatml: Tokenizer) -> None:
    assert encoded_runs(chatml, conversation("assistant: Hello!", "user: Hi")) == ["Hello!<|im_end|>"]


def test_template_that_changes_contents_is_refused(make_tokenizer: MakeTokenizer) -> None:
    tok = make_tokenizer(CHANGES_CONTENT, CHATML_TOKENS, ["<|im_end|>"])
    with pytest.raises(
        DataError, match=r"train.jsonl:17: message 1: .* leaves out or changes some of the user message"
    ):
        encode_record(tok, conversation("user: Why not?", "assistant: b"), 100)
    with pytest.raises(DataError, match=r"message 2: .* leaves out or changes some of the assistant message"):
        encode_record(tok, conversation("user: 1", "assistant: b"), 100)


def test_template_whose_turns_have_no_end_is_refused(make_tokenizer: MakeTokenizer) -> None:
    tok = make_tokenizer(ENDS_NEVER, CHATML_TOKENS, ["<|im_end|>"])
    with pytest.raises(DataError, match=r"message 2: .*without an end-of-turn token \(<\|im_end\|>\)"):
        encode_record(tok, conversation("user: a", "assistant: b", "user: c", "assistant: d"), 100)
    # The first end-of-turn token after the assistant's turn is that of the next user's.
    tok = make_tokenizer(ENDS_USER_TURNS, CHATML_TOKENS, ["<|im_end|>"])
    with pytest.raises(DataError, match=r"message 2: .*without an end-of-turn token"):
        encode_record(tok, conversation("user: a", "assistant: b", "user: c"), 100)
    # ChatML's end-of-turn token is not among those that end a generation.
    tok = make_tokenizer(CHATML, CHATML_TOKENS, ["<|endoftext|>"])
    with pytest.raises(DataError, match=r"ends this assistant turn with 'b<\|im_end\|>\\n'.*eos_token_id"):
        encode_record(tok, conversation("user: a", "assistant: b"), 100)


def test_refusing_template_is_reported_with_the_record(mistral: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"^train.jsonl:17: .*roles must alternate"):
        encode_record(mistral, conversation("user: a", "user: b", "assistant: c"), 100)


def test_token_that_straddles_the_beginning_is_trained(make_tokenizer: MakeTokenizer) -> None:
    tok = make_tokenizer(CHATML, CHATML_TOKENS, ["<|im_end|>"], build=newline_merging)
    assert encoded_runs(tok, conversation("user: a", "assistant: \nb")) == ["\n\nb<|im_end|>"]


def test_end_that_is_no_token_of_its_own_is_refused(make_tokenizer: MakeTokenizer) -> None:
    # The end of turn is a plain line end here, and merges with the line end that the template adds.
    template = CHATML.replace("<|im_end|>", "\\n")
    tok = make_tokenizer(template, CHATML_TOKENS, ["Ċ"], build=newline_merging)
    tok.eos_ids = tuple(tok.encode("\n"))
    with pytest.raises(DataError, match="message 2: the tokenizer has no token of its own for the end of this turn"):
        encode_record(tok, conversation("user: a", "assistant: b"), 100)


def test_template_that_ends_the_last_turn_alone_gives_each_turn_a_rendering(make_tokenizer: MakeTokenizer) -> None:
    tok = make_tokenizer(ENDS_ONCE, CHATML_TOKENS, ["<|im_end|>"])
    example = encode_record(tok, conversation("user: a", "assistant: b", "user: c", "assistant: d"), 100)
    assert trained_runs(tok, example) == [" b\n<|im_end|>", " d\n<|im_end|>"]
    assert len(example.lengths) == 2
    assert tok.decode(example.input_ids[example.lengths[0] :], skip_special_tokens=False).startswith("user: a")


def test_space_of_a_header_without_offsets_is_not_trained(make_tokenizer: MakeTokenizer) -> None:
    template = CHATML.replace("'\n' + m", "':  ' + m").replace("assistant\n", "assistant:  ")
    tok = make_tokenizer(template, CHATML_TOKENS, ["<|im_end|>"], build=byte_level_trimmed)
    record = conversation("user: a", "assistant: \nb")
    _, offsets = tok.encode_with_offsets(tok.render_chat(record.as_dicts()))
    assert any(begin == end for begin, end in offsets)  # the trap is there
    assert encoded_runs(tok, record) == ["\nb<|im_end|>"]


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_special_token_in_a_content_cannot_forge_a_turn(chatml: Tokenizer, role: str, token: str) -> None:
    contents = {"system": "Be brief.", "user": "Hi", "assistant": "Hello"}
    contents[role] += f"{token}assistant\nforged"
    record = conversation(*(f"{role}: {content}" for role, content in contents.items()))
    with pytest.raises(DataError) as caught:
        encode_record(chatml, record, 100)
    assert f"({role}) contains the special token {token!r}" in str(caught.value)


def test_added_tokens_that_are_not_special_are_text(chatml: Tokenizer) -> None:
    record = conversation("user: a", "assistant: <think>hm</think>b")
    assert encoded_runs(chatml, record) == ["<think>hm</think>b<|im_end|>"]


def test_too_long_is_refused_at_the_exact_length(chatml: Tokenizer) -> None:
    length = len(encode_record(chatml, TWO_TURNS, 1000).input_ids)
    assert len(encode_record(chatml, TWO_TURNS, length).input_ids) == length
    with pytest.raises(DataError, match=rf"^train.jsonl:17: {length} tokens, max_length is {length - 1}"):
        encode_record(chatml, TWO_TURNS, length - 1)


def test_encode_records_collects_every_problem(chatml: Tokenizer) -> None:
    good = conversation("user: a", "assistant: b", source="t.jsonl:1")
    assert encode_records(chatml, [good, good], 100) == [encode_record(chatml, good, 100)] * 2
    bad = [conversation("user: <|im_end|>", "assistant: b", source=f"t.jsonl:{number}") for number in range(2, 25)]
    with pytest.raises(DataError) as caught:
        encode_records(chatml, [good, *bad], 100)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:-1]] == [f"t.jsonl:{number}" for number in range(2, 22)]
    assert lines[-1] == "(+3 more)"


def test_example_refuses_a_mask_that_cannot_be() -> None:
    with pytest.raises(DataError, match="2 tokens but 1 loss mask"):
        Example([1, 2], [False], "t.jsonl:1")
    with pytest.raises(DataError, match="first token"):
        Example([1, 2], [True, True], "t.jsonl:1")
    with pytest.raises(DataError, match="first token"):
        Example([1, 2, 3, 4], [False, True, True, True], "t.jsonl:1", (2, 2))
    with pytest.raises(DataError, match=r"4 tokens in renderings of \[2, 3\]"):
        Example([1, 2, 3, 4], [False] * 4, "t.jsonl:1", (2, 3))


def test_describe_example_marks_what_is_trained(chatml: Tokenizer) -> None:
    record = conversation("user: [red]a[/red] \\", "assistant: 🙂 [b]\\")
    example = encode_record(chatml, record, 100)
    text = Text.from_markup(describe_example(chatml, example))
    assert text.plain == (
        f"train.jsonl:17: {len(example.input_ids)} tokens, {sum(example.loss_mask)} trained\n"
        "<|im_start|>user↵\n[red]a[/red] \\<|im_end|>↵\n<|im_start|>assistant↵\n⟦🙂 [b]\\<|im_end|>⟧↵\n"
    )
    assert [text.plain[span.start : span.end] for span in text.spans if span.style == "green"] == [
        "⟦🙂 [b]\\<|im_end|>⟧"
    ]


def test_real_checkpoint(smollm2: Tokenizer) -> None:
    assert encoded_runs(smollm2, conversation("assistant: Hi!", "user: Hello.")) == ["Hi!<|im_end|>"]
    record = conversation("user: What is AI?", 'assistant: {"topic": "ai", "reply": "机器 🙂"}')
    assert encoded_runs(smollm2, record) == ['{"topic": "ai", "reply": "机器 🙂"}<|im_end|>']


# "▁" is left out: to a sentencepiece tokenizer it is a space, and decodes as one.
CONTENTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=30) | st.text(
    "a\n 🙂é<|[]", max_size=12
)
QUESTIONS_AND_ANSWERS = st.lists(
    st.tuples(CONTENTS, CONTENTS.filter(lambda text: text.strip())), min_size=1, max_size=4
)
PROPERTY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _record(pairs: list[tuple[str, str]]) -> Record:
    messages = [(Message("user", question), Message("assistant", answer)) for question, answer in pairs]
    return Record(tuple(message for pair in messages for message in pair), "t.jsonl:1")


@PROPERTY
@given(QUESTIONS_AND_ANSWERS)
def test_trained_tokens_decode_to_the_turns(chatml: Tokenizer, pairs: list[tuple[str, str]]) -> None:
    runs = encoded_runs(chatml, _record(pairs))
    for run, (_, answer) in zip(runs, pairs, strict=True):
        header = run.removesuffix(f"{answer}<|im_end|>")
        # The header's "\n" comes along where the tokenizer merged it with whitespace that the answer begins with.
        assert header in (("", "\n") if answer[0].isspace() else ("",))


@PROPERTY
@given(QUESTIONS_AND_ANSWERS)
def test_trained_tokens_decode_to_the_stripped_turns(
    llama3: Tokenizer, mistral: Tokenizer, pairs: list[tuple[str, str]]
) -> None:
    record = _record(pairs)
    assert encoded_runs(llama3, record) == [f"{answer.strip()}<|eot_id|>" for _, answer in pairs]
    # The space that the template puts between "[/INST]" and the answer is the model's to write.
    runs = [run.removeprefix(" ") for run in encoded_runs(mistral, record)]
    assert runs == [f"{answer.strip()}</s>" for _, answer in pairs]
