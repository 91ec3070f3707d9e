"""Perplexity against a loop over windows: with and without BOS, short texts, windows as wide as the context."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tokenizers
import torch
from made import SPECIAL, TEXT, VOCABULARY, small_decoder, small_tokenizer
from tokenizers import processors
from tolerances import SMALL_DECODER, assert_alike
from torch.nn.functional import cross_entropy

from lorakit import Tokenizer
from lorakit.errors import DataError
from lorakit.evaluation.perplexity import perplexity


@pytest.fixture
def tok(tmp_path: Path) -> Tokenizer:
    return small_tokenizer(tmp_path)


def starting_with(tok: Tokenizer, template: str) -> Tokenizer:
    """The same tokenizer with a post-processor."""
    assert tok.folder is not None
    backend = tokenizers.Tokenizer.from_file(str(tok.folder / "tokenizer.json"))
    ids = [(token, backend.token_to_id(token)) for token in SPECIAL]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return Tokenizer(backend, eos_ids=tok.eos_ids)


@pytest.mark.parametrize("window", [7, 16, 1000])
@pytest.mark.parametrize(
    "template", [None, "<|endoftext|> $A", "<|endoftext|> <|im_start|> $A <|im_end|>", "$A <|im_end|>"]
)
def test_every_window_begins_as_the_tokenizer_begins_a_text(tok: Tokenizer, window: int, template: str | None) -> None:
    model = small_decoder(max_position_embeddings=16)
    reader = starting_with(tok, template) if template else tok
    before = [tok.encode(token)[0] for token in (template or "$A").split("$A")[0].split()]
    assert reader.prefix_ids == tuple(before)
    ids, size = tok.encode(TEXT[0]), min(window, 16) - len(before)
    losses = []
    for start in range(0, len(ids), size):
        piece = torch.tensor([*before, *ids[start : start + size]])
        each = cross_entropy(model(piece[None])[0, :-1], piece[1:], reduction="none")
        losses.append(each[max(0, len(before) - 1) :].double())
    found = math.log(perplexity(model, reader, TEXT[0], window))
    assert_alike(torch.tensor(found), torch.cat(losses).mean().float(), SMALL_DECODER + VOCABULARY)
    if before:  # a text with a BOS of its own has one all the same
        begun = "".join(token for token in SPECIAL if tok.encode(token)[0] in before) + TEXT[0]
        assert math.log(perplexity(model, reader, begun, window)) == found


def test_too_short_a_text(tok: Tokenizer) -> None:
    model = small_decoder()
    with pytest.raises(DataError, match="at least 2 tokens, got 1"):
        perplexity(model, tok, "x")
    assert perplexity(model, starting_with(tok, "<|endoftext|> $A"), "x") > 1
    with pytest.raises(DataError, match="at least 1 tokens, got 0"):
        perplexity(model, starting_with(tok, "<|endoftext|> $A"), "")
