"""A head that config.json calls tied and the file holds apart: whatever reads the folder uses the file's head."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made import IDS, conversations, small_config, small_decoder, write_checkpoint, write_weights
from safetensors.torch import load_file

from lorakit import Decoder, LoraConfig, add_adapter, load_adapter, load_model, merge_adapter, plan, save_adapter
from lorakit.adapters import merge_checkpoint
from lorakit.checkpoints.tied_head import HEAD, is_head_tied
from lorakit.errors import CheckpointError
from lorakit.inspection.measure.base_weights import BaseWeights
from lorakit.models import Checkpoint
from lorakit.models.quantize_checkpoint import quantize_checkpoint
from lorakit.quantization.policy import QuantConfig

EMBEDDING = "model.embed_tokens.weight"


def folder(path: Path, shards: int = 1, says: bool | None = True, **changes: Any) -> Path:
    """Write a checkpoint with a head of its own; `says` is the key in its config.json, None for no key."""
    config = small_config(**changes)
    del config["tie_word_embeddings"]
    write_checkpoint(path, small_decoder(**changes), config | ({} if says is None else {"tie_word_embeddings": says}))
    if shards > 1:
        tensors = load_file(path / "model.safetensors")
        (path / "model.safetensors").unlink()
        write_weights(path, tensors, shards)
    return path


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    write_weights(path, tensors)
    return path


def saved_config(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((path / "config.json").read_text())
    return values


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("quant_type", [None, "nf4"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_loading(architecture: str, quant_type: str | None, shards: int, tmp_path: Path) -> None:
    honest = load_model(folder(tmp_path / "a", says=False, architectures=[architecture]), quant_type)
    model = load_model(folder(tmp_path / "b", shards, architectures=[architecture]), quant_type)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config == honest.config and not model.config.tie_word_embeddings
    assert torch.equal(model(IDS), honest(IDS))


def test_a_head_in_four_bits(tmp_path: Path) -> None:
    source = folder(tmp_path / "a", says=False)
    with_head = quantize_checkpoint(source, tmp_path / "nf4", QuantConfig(skip=())).folder
    expected = load_model(with_head)(IDS)
    (with_head / "config.json").write_text(json.dumps(saved_config(with_head) | {"tie_word_embeddings": True}))
    assert torch.equal(load_model(with_head)(IDS), expected)
    dense = load_model(with_head, quant_type=None)
    assert not torch.equal(dense.lm_head.weight, dense.model.embed_tokens.weight)


@pytest.mark.parametrize("skip", [("lm_head",), ()])
def test_quantizing_to_files(skip: tuple[str, ...], tmp_path: Path) -> None:
    source, config = folder(tmp_path / "src"), QuantConfig(skip=skip)
    written = quantize_checkpoint(source, tmp_path / "dst", config).folder
    assert saved_config(written)["tie_word_embeddings"] is False
    assert torch.equal(load_model(written)(IDS), load_model(source, quant_config=config)(IDS))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"], ["q_proj", "lm_head"]])
def test_merging_to_files(targets: list[str], quantized: bool, tmp_path: Path) -> None:
    source = folder(tmp_path / "src")
    model = load_model(source, "nf4" if quantized else None)
    torch.manual_seed(0)
    add_adapter(model, LoraConfig(r=4, init_lora_weights=False, target_modules=targets))
    adapter = save_adapter(model, tmp_path / "adapter")
    report = merge_checkpoint(adapter, tmp_path / "out", quantize=QuantConfig() if quantized else None)
    merge_adapter(model, quantize=quantized)
    loaded = load_model(tmp_path / "out", "nf4" if quantized else None)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert saved_config(tmp_path / "out")["tie_word_embeddings"] is False and not report.notes


def test_planning_counts_it(tmp_path: Path) -> None:
    apart, tied = plan(folder(tmp_path / "a")), plan(write_tied(tmp_path / "b"))
    assert apart.parameters - tied.parameters == 400 * 32
    assert apart.parameters == sum(p.numel() for p in load_model(tmp_path / "a", None).parameters())
    (tmp_path / "a" / "model.safetensors").unlink()
    assert plan(tmp_path / "a").parameters == plan(tmp_path / "a" / "config.json").parameters == tied.parameters


def test_inspecting_reads_it(tmp_path: Path) -> None:
    source = folder(tmp_path / "src")
    assert torch.equal(BaseWeights(source).read("lm_head"), load_file(source / "model.safetensors")[HEAD].float())


def test_an_adapter_goes_from_one_to_the_other(tmp_path: Path) -> None:
    model = load_model(folder(tmp_path / "a"), None)
    add_adapter(model, LoraConfig(r=2, init_lora_weights=False))
    save_adapter(model, tmp_path / "adapter")
    other = load_model(folder(tmp_path / "b", says=False), None)
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(model(IDS), other(IDS)) and conversations(1)


def write_tied(path: Path) -> Path:
    return write_checkpoint(path, small_decoder(tie_word_embeddings=True), small_config(tie_word_embeddings=True))


class TestTied:
    def loaded(self, path: Path) -> Decoder:
        model = load_model(path, None)
        assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
        return model

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_a_head_that_is_stored_again(self, dtype: torch.dtype, tmp_path: Path) -> None:
        expected = self.loaded(write_tied(tmp_path))(IDS)
        change(tmp_path, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].to(dtype, copy=True)}))
        assert torch.equal(self.loaded(tmp_path)(IDS), expected)
        assert is_head_tied(Checkpoint(tmp_path), saved_config(tmp_path))
        written = quantize_checkpoint(tmp_path, tmp_path / "nf4").folder
        assert saved_config(written)["tie_word_embeddings"] is True and HEAD not in Checkpoint(written)

    def test_nan_equals_itself(self, tmp_path: Path) -> None:
        def edit(tensors: dict[str, torch.Tensor]) -> None:
            tensors[EMBEDDING][0, 0] = float("nan")
            tensors[HEAD] = tensors[EMBEDDING].clone()

        self.loaded(change(write_tied(tmp_path), edit))

    def test_one_number_of_difference_is_enough(self, tmp_path: Path) -> None:
        def edit(tensors: dict[str, torch.Tensor]) -> None:
            tensors[HEAD] = tensors[EMBEDDING].clone()
            tensors[HEAD][-1, -1] += 1

        model = load_model(change(write_tied(tmp_path), edit), None)
        assert int((model.lm_head.weight != model.model.embed_tokens.weight).sum()) == 1


class TestRefusals:
    def test_a_head_of_another_shape(self, tmp_path: Path) -> None:
        change(write_tied(tmp_path), lambda tensors: tensors.update({HEAD: torch.zeros(3, 3)}))
        with pytest.raises(CheckpointError, match=r"lm_head.weight has shape \(3, 3\), expected \(400, 32\)"):
            load_model(tmp_path, None)

    @pytest.mark.parametrize("says", [False, None])
    def test_no_head_where_none_is_tied(self, says: bool | None, tmp_path: Path) -> None:
        change(folder(tmp_path, says=says), lambda tensors: tensors.pop(HEAD))
        for read in (load_model, lambda path: quantize_checkpoint(path, tmp_path / "out")):
            with pytest.raises(CheckpointError, match=r"lm_head.weight is missing; if the head is the embedding, conf"):
                read(tmp_path)
