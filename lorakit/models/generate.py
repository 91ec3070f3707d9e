"""`generate`: batched greedy or sampled generation with a key/value cache and a shared prompt prefix."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from .arguments import check_decoder, check_tokenizer, prompts_of
from .chat_template import Tools
from .decoder.cache import KVCache
from .decoder.decoder import Decoder
from .tokenizer.tokenizer import Tokenizer

Conversation = Sequence[Mapping[str, Any]]

_TINY = torch.finfo(torch.float32).tiny  # a smaller temperature or top_p would be zero in fp32


def generate(
    model: Decoder,
    tok: Tokenizer,
    messages_or_prompts: str | Conversation | Sequence[str] | Sequence[Conversation],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    *,
    seed: int | None = None,
    batch_size: int = 32,
    tools: Tools | None = None,
) -> str | list[str]:
    """Continue prompts, or answer conversations through the tokenizer's chat template.

    Within `use_rows` each prompt has an adapter of its own.

    Args:
        messages_or_prompts: one prompt (str) or one conversation (list of {"role", "content"}), or a list of either. A
            prompt gets what the tokenizer puts before every text, such as BOS; a chat template writes its own.
        max_new_tokens: most tokens to add; generation stops earlier at an end-of-turn token.
        temperature: 0 is greedy; above 0 samples from softmax(logits / temperature).
        top_p: sample among the most likely tokens that together reach this probability (Holtzman et al. 2020,
            arXiv:1904.09751).
        seed: makes sampling repeatable.
        batch_size: prompts to compute at a time.
        tools: JSON Schemas of the functions that the conversations may call; None: each record's own, where the
            messages come from one.

    Returns:
        The new text alone, so that a prompt and it make up the whole text: a str for one prompt or conversation, a list
        for a list.

    Raises:
        ConfigError: a number is out of range, or the model or the tokenizer is not lorakit's.
        DataError: a prompt is neither a text nor a list of messages, is empty or leaves no room for max_new_tokens in
            the context; or `use_rows` names adapters for another number of prompts.
    """
    check_decoder(model, "generate")
    check_tokenizer(tok)
    for name, value in {"max_new_tokens": max_new_tokens, "batch_size": batch_size}.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}, expected at least 1")
    if not (0 <= temperature < math.inf and 0 < top_p <= 1):
        raise ConfigError(
            f"temperature is {temperature} and top_p {top_p}; expected a temperature of at least 0, and top_p above 0 "
            f"and at most 1"
        )
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise ConfigError(f"seed is {seed}, expected -2**63 to 2**64 - 1, the range that torch's generators take")
    inputs, is_single = prompts_of(messages_or_prompts)
    prompts = _encoded(model, tok, inputs, max_new_tokens, tools)
    sampler = _Sampler(temperature, top_p, seed, model.device)
    answers: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths together: less padding
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(prompts), batch_size):
            rows = by_length[start : start + batch_size]
            for row, token in _continue(model, prompts, rows, max_new_tokens, tok.eos_ids, sampler):
                answers[row].append(token)
    finally:
        model.train(was_training)
    texts = [tok.decode_after(prompt, ids) for prompt, ids in zip(prompts, answers, strict=True)]
    return texts[0] if is_single else texts


def _encoded(
    model: Decoder, tok: Tokenizer, inputs: Sequence[str | Conversation], max_new_tokens: int, tools: Tools | None
) -> list[list[int]]:
    """Return each prompt's token ids, after checking that its answer fits the context."""
    prompts = [
        # A chat template writes the BOS that its model wants, or none.
        tok.encode_prompt(item) if isinstance(item, str) else tok.encode(tok.render_chat(item, True, tools))
        for item in inputs
    ]
    room = model.config.context_length - max_new_tokens
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= room:
            raise DataError(
                f"prompt {index} has {len(prompt)} tokens; expected 1 to {room}, so that {max_new_tokens} more fit the "
                f"context of {model.config.context_length}"
            )
    if model.rows is not None and len(model.rows.names) != len(prompts):
        raise DataError(
            f"use_rows names an adapter for {len(model.rows.names)} rows, but there are {len(prompts)} prompts"
        )
    return prompts


@torch.inference_mode()
def _continue(
    model: Decoder,
    all_prompts: list[list[int]],
    chosen: list[int],
    max_new_tokens: int,
    eos_ids: Sequence[int],
    sampler: _Sampler,
) -> Iterator[tuple[int, int]]:
    """Yield (prompt, token) as tokens are generated for the chosen ones; end-of-turn tokens are not yielded."""
    prompts = [all_prompts[index] for index in chosen]
    prefix = _shared_prefix(prompts) if model.rows is None else 0  # each adapter has its own result
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=model.device)
    shared = None
    if prefix:
        shared = _new_cache(model, torch.zeros_like(padding[:1]), prefix)
        model.hidden_states(torch.tensor([prompts[0][:prefix]], device=model.device), cache=shared)
    cache = _new_cache(model, padding, longest - prefix + max_new_tokens, shared)
    # Any id will do as padding, which is masked; the model may have no row for the tokenizer's own padding id.
    rest = [[0] * (longest - len(prompt)) + prompt[prefix:] for prompt in prompts]
    ids = torch.tensor(rest, device=model.device)  # (batch, longest - prefix)
    rows = torch.tensor(chosen, device=model.device)
    stops = torch.tensor(list(eos_ids), device=model.device)
    unfinished = torch.ones_like(rows, dtype=torch.bool)
    for _ in range(max_new_tokens):
        with contextlib.nullcontext() if model.rows is None else model.rows.selected(rows.tolist()):
            logits = model.lm_head(model.hidden_states(ids, cache=cache)[:, -1]).float()  # (batch, vocab)
        tokens = sampler(logits)
        unfinished &= ~torch.isin(tokens, stops)
        yield from zip(rows[unfinished].tolist(), tokens[unfinished].tolist(), strict=True)
        if not unfinished.any():
            return
        if 4 * int(unfinished.sum()) <= 3 * len(rows):  # dropping rows copies the cache, as much work as half a step
            cache.select(unfinished.nonzero().squeeze(1))
            rows, tokens, unfinished = rows[unfinished], tokens[unfinished], unfinished[unfinished]
        ids = tokens[:, None]


def _shared_prefix(prompts: list[list[int]]) -> int:
    """Return how many leading tokens all prompts share, leaving at least one token of each."""
    if len(prompts) < 2:
        return 0
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
    return min(sum(1 for _ in same), *(len(prompt) - 1 for prompt in prompts))


def _new_cache(model: Decoder, padding: Tensor, capacity: int, prefix: KVCache | None = None) -> KVCache:
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    return KVCache(layers, heads, model.config.head_dim, padding, capacity, model.dtype, prefix=prefix)


class _Sampler:
    """Chooses the next tokens, (batch,) int64, from logits (batch, vocab) fp32."""

    def __init__(self, temperature: float, top_p: float, seed: int | None, device: torch.device) -> None:
        self.temperature = max(temperature, _TINY) if temperature else 0.0
        self.top_p = max(top_p, _TINY)
        self.generator = torch.Generator(device)
        if seed is not None:
            self.generator.manual_seed(seed)
        else:
            self.generator.seed()

    def __call__(self, logits: Tensor) -> Tensor:
        if self.temperature <= 0:
            return logits.argmax(dim=-1)
        # The largest becomes 0 first, so that no temperature makes it infinite.
        shifted = logits - logits.amax(dim=-1, keepdim=True)
        probs, order = (shifted / self.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= self.top_p, 0.0)  # the first is always kept
        drawn = torch.multinomial(probs, 1, generator=self.generator)
        return order.gather(1, drawn).squeeze(1)
