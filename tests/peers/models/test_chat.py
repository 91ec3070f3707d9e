"""Rendered conversations and their token ids against transformers, over the quickstart's data set."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from made import CHATML, SPECIAL, byte_level, make_tokenizer, sentencepiece
from tokenizers import processors

from lorakit import Record, Tokenizer

transformers = importlib.import_module("transformers")

# What the data set does not have: no system turn (the template adds its own), several turns, odd white space, other
# scripts, digits in a row, contents that look like markup.
OTHERS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": ""}],
    [
        {"role": "user", "content": "  leading, trailing and\n\n\nempty lines \t "},
        {"role": "assistant", "content": "\n"},
        {"role": "user", "content": "12345678 + 0.5e-3 = ?"},
    ],
    [{"role": "user", "content": "naïve café, Straße, 你好，世界, здравствуй, 👩‍👩‍👧, e\u0301"}],
    [{"role": "user", "content": "<b>{{ messages }}</b> {% raw %} <|not_a_token|> don't we'LL"}],
]


@pytest.fixture(scope="module")
def their_tok(smollm2_folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(smollm2_folder)


@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_every_conversation(tok: Tokenizer, their_tok: Any, records: list[Record], add_generation_prompt: bool) -> None:
    assert len(records) == 661
    for messages in [*(record.as_dicts() for record in records), *OTHERS]:
        ours = tok.render_chat(messages, add_generation_prompt)
        assert ours == their_tok.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        assert tok.encode(ours) == their_tok.apply_chat_template(
            messages, return_dict=False, add_generation_prompt=add_generation_prompt
        )


def test_special_ids(tok: Tokenizer, their_tok: Any) -> None:
    assert (tok.eos_id, tok.pad_id) == (their_tok.eos_token_id, their_tok.pad_token_id)
    assert tok.vocab_size == len(their_tok)


def test_decoding(tok: Tokenizer, their_tok: Any, records: list[Record]) -> None:
    for record in records:
        ids = tok.encode(tok.render_chat(record.as_dicts()))
        for skip in (False, True):
            theirs = their_tok.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert tok.decode(ids, skip_special_tokens=skip) == theirs


@pytest.mark.parametrize("build", [byte_level, sentencepiece])
@pytest.mark.parametrize("template", ["$A", "<|endoftext|> $A", "<|endoftext|> <|im_start|> $A"])
def test_a_plain_prompt_begins_alike(build: Any, template: str, tmp_path: Path) -> None:
    def with_post_processor() -> tokenizers.Tokenizer:
        backend = build()
        backend.add_special_tokens(SPECIAL)
        ids = [(token, backend.token_to_id(token)) for token in SPECIAL]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
        return backend

    ours = make_tokenizer(tmp_path, CHATML, SPECIAL, ["<|im_end|>"], with_post_processor)
    config = tmp_path / "tokenizer_config.json"
    # Beside a tokenizer.json, transformers 5 takes no notice of this key.
    config.write_text(json.dumps(json.loads(config.read_text()) | {"add_bos_token": template == "$A"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("The lazy dog", "x", "", " It does", "Water <|im_end|> boils"):
        assert ours.encode_prompt(text) == theirs(text).input_ids
    chat = [{"role": "user", "content": "fox?"}]
    rendered = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ours.encode(ours.render_chat(chat, True)) == rendered
