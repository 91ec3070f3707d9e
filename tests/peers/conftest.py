"""What the comparisons with the peers share: one model in both libraries, and the real data of the quickstart.

Run as: make test-peers
"""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lorakit import Decoder, Record, Tokenizer, load_model, load_records, load_tokenizer
from lorakit.data.chatterbot import build_chatterbot

os.environ["HF_HUB_OFFLINE"] = "1"  # before the peers are imported: everything is on disk, nobody need ask the network


@pytest.fixture(scope="session")
def our_model(smollm2_folder: Path) -> Decoder:
    """SmolLM2 in fp32, not quantized, in our decoder. Tests that attach adapters take `fresh`."""
    return load_model(smollm2_folder, quant_type=None, dtype=torch.float32)


@pytest.fixture(scope="session")
def their_model(smollm2_folder: Path) -> nn.Module:
    """The same checkpoint in transformers."""
    transformers = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tok(smollm2_folder: Path) -> Tokenizer:
    return load_tokenizer(smollm2_folder)


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """The quickstart's whole data set, training and held-out conversations."""
    folder = tmp_path_factory.mktemp("chatterbot")
    build_chatterbot(folder)
    return [*load_records(folder / "train.jsonl"), *load_records(folder / "eval.jsonl")]


@pytest.fixture(scope="session")
def license_ids(tok: Tokenizer) -> list[int]:
    """Tokens of a long real text, the licence."""
    return tok.encode((Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def fresh() -> Callable[[nn.Module], nn.Module]:
    """fresh(model): a copy that shares the memory of the frozen weights; an adapter is attached to the copy alone."""

    def copied(model: nn.Module) -> nn.Module:
        return copy.deepcopy(model, {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()})

    return copied


@pytest.fixture(scope="session")
def logits_of() -> Callable[[nn.Module, Tensor], Tensor]:
    """logits_of(model, ids): (batch, seq) -> (batch, seq, vocab), from our decoder or any of transformers' shape."""

    @torch.inference_mode()
    def logits(model: nn.Module, ids: Tensor) -> Tensor:
        out = model(ids)
        return out if isinstance(out, Tensor) else out.logits

    return logits
