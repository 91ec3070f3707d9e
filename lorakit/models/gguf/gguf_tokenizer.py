"""A GGUF file's tokenizer as tokenizer.json and tokenizer_config.json.

GGUF keeps the tokens, the merges and each token's type, but only the pre-tokenizer's name (`tokenizer.ggml.pre`): the
code that splits text lives in llama.cpp. `PRE_TOKENIZERS` maps each name to its meaning; a new one is a line there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from ...errors import CheckpointError, did_you_mean
from .gguf_file import GGUFFile

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type that are matched before any pre-tokenizer runs

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """The meaning of a `tokenizer.ggml.pre` name.

    Attributes:
        build: makes the pre-tokenizer.
        ignore_merges: whether a word that is itself a token is kept, not rebuilt from merges.
        add_bos: whether sequences start with BOS unless the file says otherwise.
    """

    build: Callable[[], Any]
    ignore_merges: bool = False
    add_bos: bool = False


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _llama3() -> Any:
    split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": PreTokenizer(_gpt2),
    "smollm": PreTokenizer(_smollm),
    "llama-bpe": PreTokenizer(_llama3, ignore_merges=True, add_bos=True),
}


def special_token_ids(source: GGUFFile) -> dict[str, int]:
    """Return the file's special tokens, such as {"bos_token": 1, "eos_token": 2, "pad_token": 2}.

    Raises:
        CheckpointError: there is no eos token, or an id lies outside the vocabulary.
    """
    tokens = source.value("tokenizer.ggml.tokens", list)
    ids = {}
    for short, long in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        key = f"tokenizer.ggml.{long}_token_id"
        token_id = source.get(key, int)
        if token_id is not None and not 0 <= token_id < len(tokens):
            raise CheckpointError(f"{source.path}: {key} is {token_id}, the vocabulary has {len(tokens)} tokens")
        if token_id is not None:
            ids[f"{short}_token"] = token_id
    if "eos_token" not in ids:
        raise CheckpointError(f"{source.path}: metadata key 'tokenizer.ggml.eos_token_id' is missing")
    return ids


def tokenizer_files(source: GGUFFile, max_length: int) -> dict[str, str]:
    """Return the text of tokenizer.json and tokenizer_config.json, by file name.

    Raises:
        CheckpointError: the tokenizer is not byte-level BPE, its pre-tokenizer is unknown, or its tokens, types and
            merges contradict each other.
    """
    tokens: list[str] = source.value("tokenizer.ggml.tokens", list)
    special = special_token_ids(source)
    config: dict[str, Any] = {
        # This class loads tokenizer.json as it stands. GPT2Tokenizer, which some originals name, rebuilds the
        # pre-tokenizer in transformers 5 and would lose the digit splitting.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        **{name: tokens[token_id] for name, token_id in special.items()},
    }
    if (template := source.get("tokenizer.chat_template", str)) is not None:
        config["chat_template"] = template
    tokenizer = _tokenizer(source, tokens, special)
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }


def _tokenizer(source: GGUFFile, tokens: list[str], special: dict[str, int]) -> Tokenizer:
    pre = _pre_tokenizer(source)
    types: list[int] = source.value("tokenizer.ggml.token_type", list)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(types) != len(tokens) or len(vocabulary) != len(tokens):
        raise CheckpointError(
            f"{source.path}: {len(tokens)} tokens, {len(vocabulary)} of them distinct, and {len(types)} token types; "
            "the three numbers must be equal"
        )
    model = models.BPE(vocabulary, _merges(source, vocabulary), ignore_merges=pre.ignore_merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre.build()
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):
        if kind == CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    add_bos = source.get("tokenizer.ggml.add_bos_token", bool)
    if "bos_token" in special and (pre.add_bos if add_bos is None else add_bos):
        bos = tokens[special["bos_token"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, special["bos_token"])]
        )
    return tokenizer


def _pre_tokenizer(source: GGUFFile) -> PreTokenizer:
    kind = source.value("tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise CheckpointError(f"{source.path}: tokenizer model '{kind}' is not supported, only byte-level BPE ('gpt2')")
    name = source.value("tokenizer.ggml.pre", str)
    if name not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{source.path}: unknown pre-tokenizer '{name}' (known: {', '.join(PRE_TOKENIZERS)})"
            f"{did_you_mean(name, PRE_TOKENIZERS)}"
        )
    return PRE_TOKENIZERS[name]


def _merges(source: GGUFFile, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for index, line in enumerate(source.value("tokenizer.ggml.merges", list)):
        left, _, right = str(line).partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise CheckpointError(f"{source.path}: merge {index}, {line!r}, does not join two tokens into a third")
        merges.append((left, right))
    return merges
