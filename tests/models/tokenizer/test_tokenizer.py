"""Tokenizer: ids and offsets on the real vocabulary, chat templates as transformers renders them, errors by file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gguf_files import SPECIAL, TEMPLATE, VOCABULARY

from lorakit.errors import CheckpointError, DataError
from lorakit.models.tokenizer.tokenizer import Tokenizer, load_tokenizer

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<b>Hé</b>"}]
MakeFolder = Callable[..., Path]


@pytest.fixture(scope="module")
def real(smollm2: Path) -> Tokenizer:
    return load_tokenizer(smollm2)


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Write a tokenizer folder; `files` are texts or objects by name, None leaves one out."""

    def make(template: Any = TEMPLATE, config: Mapping[str, Any] | None = None, **files: Any) -> Path:
        model = tokenizers.models.BPE({token: i for i, token in enumerate(VOCABULARY)}, [])
        backend = tokenizers.Tokenizer(model)
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        backend.add_special_tokens(SPECIAL)
        contents = {
            "tokenizer.json": json.loads(backend.to_str()),
            "tokenizer_config.json": {"eos_token": "<|im_end|>", "chat_template": template, **(config or {})},
            **{name.replace("_json", ".json").replace("_jinja", ".jinja"): value for name, value in files.items()},
        }
        for name, content in contents.items():
            if content is not None:
                (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path

    return make


# text


def test_the_real_tokenizer(real: Tokenizer, smollm2: Path) -> None:
    assert (real.eos_token, real.eos_id, real.eos_ids, real.pad_id) == ("<|im_end|>", 2, (2,), 2)
    assert real.vocab_size == 49152 and real.folder == smollm2
    ids = real.encode("<|im_start|>user\n2024<|im_end|>")
    assert ids[0] == 1 and ids[-1] == 2
    assert [real.decode([i]) for i in ids[1:-1]] == ["user", "\n", "2", "0", "2", "4"]  # digits stand alone
    assert real.encode("Hi", add_special_tokens=True) == real.encode("Hi")  # no BOS is ever added
    assert real.decode(ids) == "user\n2024"
    assert real.decode(ids, skip_special_tokens=False) == "<|im_start|>user\n2024<|im_end|>"


# SmolLM2 has no token for the bytes 0xF1 and 0xF2, which begin the characters of planes 4 to 11, and for six control
# characters: those vanish, in transformers too.
IN_VOCABULARY = st.characters(exclude_categories=["Cs"], exclude_characters="\x04\x06\x13\x14\x16\x1d").filter(
    lambda character: not 0x40000 <= ord(character) < 0xC0000
)


def test_a_byte_without_a_token_vanishes(real: Tokenizer) -> None:
    assert real.encode("a\x04b") == real.encode("a") + real.encode("b")


@settings(deadline=None)
@given(text=st.text(IN_VOCABULARY))
def test_any_text_comes_back_and_its_offsets_cover_it(real: Tokenizer, text: str) -> None:
    ids, offsets = real.encode_with_offsets(text)
    assert ids == real.encode(text) and len(ids) == len(offsets)
    assert real.decode(ids, skip_special_tokens=False) == text
    covered = [False] * len(text)
    for start, end in offsets:
        assert 0 <= start < end <= len(text)
        covered[start:end] = [True] * (end - start)
    assert all(covered)
    assert offsets == sorted(offsets)


def test_offsets_count_characters_not_bytes(real: Tokenizer) -> None:
    text = "Hé 🤖 <|im_end|> ok"
    ids, offsets = real.encode_with_offsets(text)
    start, end = offsets[ids.index(2)]
    assert text[start:end] == "<|im_end|>"
    assert text[slice(*offsets[-1])] == " ok"


@pytest.mark.parametrize(("text", "message"), [("a\ud800b", "character 1 is a lone surrogate"), (b"x", "a bytes")])
def test_what_is_no_text_cannot_be_encoded(real: Tokenizer, text: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        real.encode(text)


@pytest.mark.parametrize("ids", [[-100], [2**40], ["x"], [None]])
def test_what_is_no_id_cannot_be_decoded(real: Tokenizer, ids: Any) -> None:
    with pytest.raises(DataError, match="token ids cannot be decoded"):
        real.decode(ids)


def test_saved_truncation_and_padding_are_switched_off(make_folder: MakeFolder) -> None:
    folder = make_folder()
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(folder / "tokenizer.json"))
    assert len(load_tokenizer(folder).encode("abcdef")) == 6


# special tokens


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config_json": {"eos_token_id": [2, 0]}, "config_json": {"eos_token_id": 1}}, (2, 0)),
        ({"generation_config_json": {}, "config_json": {"eos_token_id": 1}}, (1,)),
        ({"config_json": {"eos_token_id": None}}, (2,)),
        ({}, (2,)),
    ],
)
def test_where_the_eos_ids_come_from(make_folder: MakeFolder, files: dict[str, Any], expected: tuple[int, ...]) -> None:
    tokenizer = load_tokenizer(make_folder(**files))
    assert tokenizer.eos_ids == expected
    assert (tokenizer.eos_id, tokenizer.eos_token) == (2, "<|im_end|>")


def test_special_tokens_in_both_forms(make_folder: MakeFolder) -> None:
    config = {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "pad_token": "<|endoftext|>", "unk_token": None}
    tokenizer = load_tokenizer(make_folder(config=config))
    assert (tokenizer.eos_id, tokenizer.pad_id) == (2, 0)
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def test_without_a_tokenizer_config_the_models_eos_serves(make_folder: MakeFolder) -> None:
    tokenizer = load_tokenizer(make_folder(tokenizer_config_json=None, config_json={"eos_token_id": [1, 2]}))
    assert (tokenizer.eos_id, tokenizer.eos_token, tokenizer.pad_id) == (1, "<|im_start|>", 1)
    assert tokenizer.chat_template is None


# chat templates


def test_the_real_template(real: Tokenizer) -> None:
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    turns = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<b>Hé</b><|im_end|>\n"
    assert real.render_chat(MESSAGES) == system + turns
    assert real.render_chat(MESSAGES[:1], add_generation_prompt=True) == (
        system + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages | tojson }}", json.dumps(MESSAGES, ensure_ascii=False)),
        ("{{ messages[0] | tojson(indent=2) }}", json.dumps(MESSAGES[0], indent=2)),
        ("{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "user"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
        (
            "{{ eos_token }}{{ bos_token is defined }}{{ tools is none }}{{ documents is none }}",
            "<|im_end|>FalseTrueTrue",
        ),
        ("a\n  {% if true %}\nb\n  {% endif %}\n", "a\nb\n"),  # trim_blocks and lstrip_blocks
        ("{{ strftime_now('%Y') }}", str(datetime.now().year)),
        ("{{ add_generation_prompt }}", "False"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
    ],
)
def test_templates_have_what_transformers_gives_them(make_folder: MakeFolder, template: str, expected: str) -> None:
    assert load_tokenizer(make_folder(template)).render_chat(MESSAGES) == expected


def test_a_key_without_a_value_is_absent(make_folder: MakeFolder) -> None:
    message: dict[str, Any] = {"role": "user", "content": None}
    template = "{{ messages[0].content is defined }}"
    assert load_tokenizer(make_folder(template)).render_chat([message]) == "False"


def test_a_template_file_wins_and_default_is_taken_of_several(make_folder: MakeFolder) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    assert load_tokenizer(make_folder(named)).render_chat(MESSAGES) == "default"
    assert load_tokenizer(make_folder(named, chat_template_jinja="file")).render_chat(MESSAGES) == "file"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("\n{{ raise_exception('roles must alternate') }}", "line 2, refuses these messages: roles must alternate"),
        ("\n\n{{ messages[0].name + 'x' }}", "line 3, fails on these messages: UndefinedError"),
        ("{{ messages.append(1) }}", "line 1, fails on these messages: SecurityError"),
        ("{{ messages.__class__.__mro__ }}", "line 1, fails on these messages: SecurityError"),
        ("{% for i in range(10**9) %}{% endfor %}", "line 1, fails on these messages: OverflowError"),
        ("{{ 1 / 0 }}", "line 1, fails on these messages: ZeroDivisionError"),
    ],
)
def test_a_template_that_fails_names_its_line(make_folder: MakeFolder, template: str, message: str) -> None:
    tokenizer = load_tokenizer(make_folder(template))
    with pytest.raises(DataError, match=rf"tokenizer_config\.json: chat template, {message}"):
        tokenizer.render_chat(MESSAGES)


def test_conversations_that_are_none(make_folder: MakeFolder) -> None:
    tokenizer = load_tokenizer(make_folder())
    with pytest.raises(DataError, match="at least one message"):
        tokenizer.render_chat([])
    with pytest.raises(DataError, match="message 1 is a str, expected a mapping"):
        tokenizer.render_chat([MESSAGES[0], "Hi"])  # type: ignore[list-item]
    with pytest.raises(DataError, match="there is no chat template"):
        load_tokenizer(make_folder(None)).render_chat(MESSAGES)


# what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_json": None}, r"there is no tokenizer\.json here"),
        ({"tokenizer_json": "{\n1"}, r"tokenizer\.json: not valid JSON: .*line 2"),
        ({"tokenizer_json": {"version": "1.0"}}, r"tokenizer\.json: not a tokenizer"),
        ({"tokenizer_config_json": "[]"}, r"tokenizer_config\.json: holds a JSON list"),
        ({"tokenizer_config_json": {}}, "no eos token"),
        ({"config": {"eos_token": "<eos>"}}, "eos_token is '<eos>', which tokenizer.json does not have"),
        ({"config": {"pad_token": "<pad>"}}, "pad_token is '<pad>', which tokenizer.json does not have"),
        ({"config": {"eos_token": 2}}, "eos_token is 2, expected a string"),
        ({"config": {"eos_token": {"text": "x"}}}, "expected a string or an object with 'content'"),
        ({"config_json": {"eos_token_id": 9999}}, r"config\.json: eos_token_id is 9999, expected ids"),
        ({"config_json": {"eos_token_id": [True]}}, r"eos_token_id is \[True\], expected ids"),
        ({"config_json": {"eos_token_id": []}}, r"eos_token_id is \[\], expected ids"),
        ({"template": "a\n{% if %}"}, r"tokenizer_config\.json: chat template, line 2"),
        ({"template": 3}, "chat_template is a int, expected a string"),
        ({"template": ["x"]}, "each item needs 'name' and 'template'"),
        ({"chat_template_jinja": "{{"}, r"chat_template\.jinja: chat template, line 1"),
    ],
)
def test_malformed_folders_are_refused(make_folder: MakeFolder, changes: dict[str, Any], message: str) -> None:
    folder = make_folder(**changes)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(folder)
