"""Small real tokenizers, trained in memory on a few lines, in folders as checkpoints have them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from lorakit.models.tokenizer.tokenizer import Tokenizer, load_tokenizer

TEXT = [
    "The quick brown fox jumps over the lazy dog.\n\nIt does so every day, and the dog does not mind.\n",
    "user\nWhat is the capital of France?\n\n\nassistant\nParis is the capital of France.",
    '{"topic": "science", "reply": "Water boils at 100 °C."}\n    def f(x):\n        return x + 1\n\n\n\n',
]


def make_tokenizer(
    folder: Path,
    template: str,
    special: Sequence[str],
    eos: Sequence[str],
    build: Callable[[], tokenizers.Tokenizer],
    plain: Sequence[str] = (),
) -> Tokenizer:
    """Save a tokenizer with its template and special tokens (the first is BOS) into a folder and load it from there."""
    backend = build()
    backend.add_special_tokens(list(special))
    backend.add_tokens(list(plain))
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": eos[0], "bos_token": special[0], "chat_template": template}
    _write(folder / "tokenizer_config.json", config)
    _write(folder / "generation_config.json", {"eos_token_id": [backend.token_to_id(token) for token in eos]})
    return load_tokenizer(folder)


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2's kind: bytes as characters, so a character outside the merges takes several tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(TEXT, _trainer(pre_tokenizers.ByteLevel.alphabet()))
    return backend


def byte_level_trimmed() -> tokenizers.Tokenizer:
    """As `byte_level`, with the post-processor that trims the spaces from offsets, so that " " has none."""
    backend = byte_level()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return backend


def newline_merging() -> tokenizers.Tokenizer:
    """A tokenizer that splits nothing before merging: "\\n" of a header and "\\n" of a content become one token."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(["\n\n"] * 4, _trainer(pre_tokenizers.ByteLevel.alphabet()))
    return backend


def sentencepiece() -> tokenizers.Tokenizer:
    """Llama 2's kind: "▁" for spaces, one put before each stretch of text, bytes for unknown characters."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizer
    trained.train_from_iterator(TEXT, _trainer([]))
    model = json.loads(trained.to_str())["model"]
    vocabulary = model["vocab"] | {f"<0x{byte:02X}>": len(model["vocab"]) + byte for byte in range(256)}
    merges = [tuple(merge) for merge in model["merges"]]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def _trainer(alphabet: Sequence[str]) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(vocab_size=420, initial_alphabet=list(alphabet), show_progress=False)
