"""Prompts: what comes before a text that is continued, and the text of what continues it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from lorakit import Tokenizer

SPECIAL = ("<s>", "</s>", "<|user|>", "<|bot|>")
PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
SPACE_AND_BYTES = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]

# One token a character and no merges, so that the tokens of a prompt are the first ones of prompt and answer.
KINDS: dict[str, tuple[Any, Any, Any]] = {  # normalizer, pre-tokenizer, decoder
    "bytes": (None, pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
    "prepend": (PREPEND, None, decoders.Sequence([*SPACE_AND_BYTES, decoders.Strip(" ", 1, 0)])),
    "never": (normalizers.Replace(" ", "▁"), None, decoders.Sequence(SPACE_AND_BYTES)),
    **{
        scheme: (
            None,
            pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False),
            decoders.Sequence([*SPACE_AND_BYTES, decoders.Strip(" ", 1, 0)]),
        )
        for scheme in ("first", "always")
    },
}


@cache
def backend(kind: str) -> tokenizers.Tokenizer:
    normalizer, pre_tokenizer, decoder = KINDS[kind]
    letters = [*map(chr, range(33, 127)), "▁", "é"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) if kind == "bytes" else ["<unk>", *byte_tokens, *letters]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=kind != "bytes"))
    made.decoder = decoder
    if normalizer is not None:
        made.normalizer = normalizer
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    made.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    made.add_tokens([AddedToken("<think>", normalized=False)])
    return made


def tokenizer(kind: str, post_processor: str | None = None) -> Tokenizer:
    """A tokenizer whose post-processor follows a template, such as "<s> $A </s>"."""
    made = tokenizers.Tokenizer.from_str(backend(kind).to_str())
    if post_processor:
        made.post_processor = processors.TemplateProcessing(
            single=post_processor, special_tokens=[(token, made.token_to_id(token)) for token in SPECIAL]
        )
    return Tokenizer(made, eos_ids=[made.token_to_id("</s>")])


def ids(tok: Tokenizer, tokens: Sequence[str]) -> list[int]:
    return [token for text in tokens for token in [tok._backend.token_to_id(text)]]


class TestWhatComesBefore:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        ("post_processor", "before"),
        [
            (None, []),
            ("<s> $A", ["<s>"]),
            ("<s> $A </s>", ["<s>"]),
            ("$A </s>", []),
            ("</s> $A", ["</s>"]),
            ("<s> <|user|> $A <|bot|> </s>", ["<s>", "<|user|>"]),
        ],
    )
    def test_the_post_processor_says_so_and_no_prompt_ends(
        self, kind: str, post_processor: str | None, before: list[str]
    ) -> None:
        tok = tokenizer(kind, post_processor)
        assert tok.prefix_ids == tuple(ids(tok, before))
        for text in ("Once upon a time", "x", "", "a</s>b"):
            assert tok.encode_prompt(text) == ids(tok, before) + tok.encode(text)

    def test_a_text_that_brings_its_own_gets_no_second(self) -> None:
        tok = tokenizer("prepend", "<s> $A")
        assert tok.encode_prompt("<s>Hi") == tok.encode("<s>Hi")
        assert tok.encode_prompt("a<s>") == [*tok.prefix_ids, *tok.encode("a<s>")]
        two = tokenizer("prepend", "<s> <|user|> $A")
        assert two.encode_prompt("<s><|user|>Hi") == two.encode("<s><|user|>Hi")

    def test_other_post_processors(self) -> None:
        tok = tokenizer("bytes")
        tok._backend.post_processor = processors.ByteLevel(trim_offsets=True)
        assert tok.encode_prompt("Hi") == tok.encode("Hi") and tok.prefix_ids == ()
        made = tokenizers.Tokenizer.from_str(backend("bytes").to_str())
        pair = [(token, made.token_to_id(token)) for token in ("</s>", "<s>")]
        made.post_processor = processors.RobertaProcessing(*pair)
        roberta = Tokenizer(made, eos_ids=[pair[0][1]])
        assert roberta.encode_prompt("Hi") == [pair[1][1], *roberta.encode("Hi")]


PIECES = st.lists(st.sampled_from(["a", "b", " ", "  ", "\n", "é", "€", "😀", *SPECIAL, "<think>"]), max_size=5)


class TestWhatContinues:
    @pytest.mark.parametrize("post_processor", [None, "<s> $A </s>"])
    @pytest.mark.parametrize("kind", KINDS)
    @given(before=PIECES, after=st.text("ab €é\n😀", max_size=6))
    def test_prompt_and_answer_are_the_text(
        self, kind: str, post_processor: str | None, before: list[str], after: str
    ) -> None:
        tok = tokenizer(kind, post_processor)
        prompt, whole = tok.encode_prompt("".join(before)), tok.encode_prompt("".join(before) + after)
        assert whole[: len(prompt)] == prompt
        got = tok.decode_after(prompt, whole[len(prompt) :])
        begins = not before or before[-1] in (*SPECIAL, "<think>")
        # At the beginning of a text, Metaspace gives "a" and " a" the same tokens.
        assert got == after or (kind in ("first", "always") and begins and f" {got}" == after)

    def test_a_character_that_stops_half_way_does_not_touch_what_is_before(self) -> None:
        tok = tokenizer("prepend")
        euro = [tok._backend.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
        assert tok.decode_after(tok.encode_prompt("a€"), euro) == "€"
        assert tok.decode_after(tok.encode_prompt("a€"), euro[:2]) == "\ufffd\ufffd"
        assert tok.decode_after(tok.encode_prompt("a"), [*euro, *euro[:1]]).endswith("\ufffd")

    def test_nothing_and_special_tokens_add_no_text(self) -> None:
        tok = tokenizer("always", "<s> $A")
        assert tok.decode_after(tok.encode_prompt("a"), []) == ""
        assert tok.decode_after(tok.encode_prompt("a"), ids(tok, ["</s>"])) == ""
