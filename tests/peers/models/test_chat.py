"""Rendered conversations and their token ids against transformers, over the quickstart's data set."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

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
