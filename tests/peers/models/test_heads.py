"""Folders whose config.json and tensors disagree about the output head, or about rope, against transformers."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from made import IDS, small_config, small_decoder, write_checkpoint
from safetensors.torch import load_file, save_file
from tolerances import SMALL_DECODER, assert_alike

from lorakit import load_model
from lorakit.models import DecoderConfig
from lorakit.models.quantize_checkpoint import quantize_checkpoint

transformers = importlib.import_module("transformers")


def written(folder: Path, **changes: Any) -> Path:
    config = {**small_config(), "model_type": "llama", **changes}
    return write_checkpoint(folder, small_decoder(), {key: value for key, value in config.items() if value != "absent"})


# Without a head and not tied: transformers fills it with random numbers, lorakit refuses.
@pytest.mark.parametrize(
    ("says", "stored"), [(True, "apart"), (True, "twice"), (True, "once"), (False, "apart"), (False, "twice")]
)
def test_the_head_in_use(says: bool, stored: str, tmp_path: Path) -> None:
    folder = written(tmp_path, tie_word_embeddings=says)
    tensors = load_file(folder / "model.safetensors")
    if stored != "apart":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if stored == "once":
        del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load_model(folder, None, torch.float32)
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)
    assert_alike(ours(IDS), theirs(IDS).logits, SMALL_DECODER)


def test_a_quantized_folder_does_not_say_tied(tmp_path: Path) -> None:
    folder = quantize_checkpoint(written(tmp_path / "src", tie_word_embeddings=True), tmp_path / "dst").folder
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.tie_word_embeddings is False


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e5},
        {"rope_theta": "absent"},
        {"rope_theta": "absent", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        {
            "original_max_position_embeddings": 64,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        },
    ],
    ids=json.dumps,
)
def test_rope_wherever_it_stands(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = written(tmp_path, **changes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    parameters = theirs.config.rope_parameters
    config = DecoderConfig.from_dict(json.loads((folder / "config.json").read_text()))
    assert config.rope_theta == parameters["rope_theta"]
    for key, value in (config.rope_scaling or {"rope_type": "default"}).items():
        assert parameters[key] == value
    ids = torch.arange(100)[None]  # long enough for the frequencies to tell
    assert_alike(load_model(folder, None, torch.float32)(ids), theirs(ids).logits, SMALL_DECODER + 100)
