"""Our decoder and generation against transformers, on the real weights in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import SMOLLM2, assert_alike
from torch import Tensor, nn

from lorakit import Decoder, Tokenizer, generate

LogitsOf = Callable[[nn.Module, Tensor], Tensor]
NEW_TOKENS = 64

PLAIN = [
    "The",
    "The capital of France is",
    "Once upon a time, in a village at the edge of a great forest,",
    "def fibonacci(n: int) -> int:\n    ",
    "Water boils at 100 degrees Celsius at sea level. On a high mountain it boils at a lower temperature, because",
    "1, 2, 4, 8, 16,",
    "Ingredients for a simple bread:\n- 500 g flour\n- 10 g salt\n-",
    "SELECT name, COUNT(*) FROM visits\nWHERE",
    "Die Hauptstadt von Österreich ist",
    "The first law of thermodynamics says that energy is neither created nor destroyed. "
    "The second law says that the entropy of an isolated system never decreases. Together they mean that",
]
QUESTIONS = [
    "Hello!",
    "What is the capital of Japan?",
    "Write a haiku about autumn.",
    "Explain in two sentences why the sky is blue.",
    "Give me three names for a cat, as a list.",
    "Translate into French: The weather is fine today.",
    "What is 17 + 25?",
    'Answer with one JSON object, {"color": ...}: which color has a ripe lemon?',
    "Summarize in one sentence: Photosynthesis turns carbon dioxide and water into sugar and oxygen, using the energy "
    "of light. It takes place in the chloroplasts of plants and algae, and nearly all life depends on it.",
    "How do I reverse a list in Python?",
]
CHATS = [[{"role": "user", "content": question}] for question in QUESTIONS]


@pytest.fixture
def their_model_with(their_model: nn.Module, request: pytest.FixtureRequest) -> nn.Module:
    before = their_model.config._attn_implementation
    their_model.set_attn_implementation(request.param)
    yield their_model
    their_model.set_attn_implementation(before)


@pytest.mark.parametrize("their_model_with", ["eager", "sdpa"], indirect=True)
@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (1, 520)], ids=str)  # 520: our other attention path
def test_logits(
    our_model: Decoder, their_model_with: nn.Module, license_ids: list[int], shape: tuple[int, int], logits_of: LogitsOf
) -> None:
    batch, length = shape
    ids = torch.tensor(license_ids[: batch * length]).view(batch, length)
    assert_alike(logits_of(our_model, ids), logits_of(their_model_with, ids), SMOLLM2)


def test_packed_is_one_by_one(
    our_model: Decoder, their_model: nn.Module, license_ids: list[int], logits_of: LogitsOf
) -> None:
    lengths = [30, 1, 170, 12, 75]
    packed = torch.tensor(license_ids[: sum(lengths)])
    with torch.inference_mode():
        ours = our_model.lm_head(our_model.hidden_states(packed, lengths=lengths))
    parts = packed.split(lengths)
    alone = torch.cat([logits_of(our_model, part[None])[0] for part in parts])
    theirs = torch.cat([logits_of(their_model, part[None])[0] for part in parts])
    assert_alike(ours, alone, SMOLLM2)
    assert_alike(ours, theirs, SMOLLM2)


@pytest.fixture(scope="module")
def their_answers(their_model: Any, tok: Tokenizer) -> list[list[int]]:
    """transformers' greedy tokens for PLAIN and CHATS, one prompt at a time, without the end-of-turn token."""
    answers = []
    for prompt in encode(tok, [*PLAIN, *CHATS]):
        ids = their_model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
        new = ids[0, len(prompt) :].tolist()
        answers.append([token for token in new if token not in tok.eos_ids])
    return answers


def test_greedy_tokens_of_one_left_padded_batch(
    our_model: Decoder, tok: Tokenizer, their_answers: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [*PLAIN, *CHATS]
    assert len({len(prompt) for prompt in encode(tok, prompts)}) > 10
    assert sum(len(answer) == NEW_TOKENS for answer in their_answers) >= 10  # and the others end by themselves
    assert min(map(len, their_answers)) < NEW_TOKENS
    monkeypatch.setattr(tok, "decode_after", lambda prompt, ids: list(ids))  # generate then returns token ids
    assert generate(our_model, tok, prompts, NEW_TOKENS, batch_size=len(prompts)) == their_answers


def test_greedy_tokens_behind_a_shared_prefix(
    our_model: Decoder, tok: Tokenizer, their_answers: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len({tuple(prompt[:20]) for prompt in encode(tok, CHATS)}) == 1  # the system turn, computed once for all
    monkeypatch.setattr(tok, "decode_after", lambda prompt, ids: list(ids))
    assert generate(our_model, tok, CHATS, NEW_TOKENS, batch_size=len(CHATS)) == their_answers[len(PLAIN) :]


def encode(tok: Tokenizer, prompts: list[Any]) -> list[list[int]]:
    texts = [p if isinstance(p, str) else tok.render_chat(p, add_generation_prompt=True) for p in prompts]
    return [tok.encode(text) for text in texts]
