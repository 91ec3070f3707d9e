"""Merged checkpoints: the weights of the merged model to the bit, in whole folders, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from made import CHATML, small_config, small_decoder, write_checkpoint
from safetensors.torch import load_file, save_file
from tolerances import rounding
from torch import nn

from lorakit import LoraConfig, add_adapter, load_adapter, load_model, load_tokenizer, merge_adapter, save_adapter
from lorakit.adapters import lora_layers, merge_checkpoint
from lorakit.errors import AdapterError, CheckpointError, ConfigError, LorakitError, StorageError
from lorakit.models import Checkpoint
from lorakit.models.quantize_checkpoint import quantize_checkpoint
from lorakit.quantization.policy import QuantConfig

IDS = torch.tensor([[1, 5, 99, 17, 3, 250]])
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 1}},
    "dora": {"use_dora": True},
    "hira": {"variant": "hira"},
    "head": {"target_modules": r".*(_proj|lm_head)"},
}


def write_adapter(folder: Path, base: Path, **settings: Any) -> Path:
    model = load_model(base)
    torch.manual_seed(0)
    add_adapter(model, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **settings))
    for layer in lora_layers(model).values():
        for key, parameter in layer.parameters_of("default").items():
            parameter.data *= 1 + 0.1 * torch.randn_like(parameter) if "magnitude" in key else 1
    return save_adapter(model, folder)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small_config(tie_word_embeddings=request.param)
    model = small_decoder(tie_word_embeddings=request.param)
    return write_checkpoint(tmp_path_factory.mktemp("base") / "model", model, config, shards=2)


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("case", CASES)
def test_the_weights_of_the_merged_model(case: str, quantized: bool, base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, **CASES[case])
    report = merge_checkpoint(adapter, tmp_path / "out", quantize=QuantConfig() if quantized else None)
    model = load_model(base)
    load_adapter(model, adapter)
    expected = merge_adapter(model, quantize=quantized)
    loaded = load_model(tmp_path / "out", quant_type="nf4" if quantized else None)
    assert_equal(loaded, model)
    assert torch.equal(loaded(IDS), model(IDS))
    assert loaded.config == model.config
    shares = {layer.path: layer.share for layer in report.layers}
    # Sums in float64 over as many numbers as the largest weight has; the last bit depends on where in memory it lies.
    bound = 2 * float(rounding(max(p.numel() for p in model.parameters()), 1.0, torch.float64))
    assert shares == pytest.approx({layer.path: layer.share for layer in expected.layers}, rel=bound)
    is_parted = case == "head" and Checkpoint(base).config()["tie_word_embeddings"]
    assert report.base == base and bool(report.notes) == is_parted


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_whole_folder_in_shards(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "run" / "adapter", base)
    done: list[tuple[int, int]] = []
    merge_checkpoint(tmp_path / "run", tmp_path / "out", shard_bytes=20_000, progress=lambda *at: done.append(at))
    files = {path.name for path in (tmp_path / "out").iterdir()}
    shards = {name for name in files if name.endswith(".safetensors")}
    assert len(shards) > 2 and {"config.json", "model.safetensors.index.json", "tokenizer.json"} <= files
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == shards
    assert sorted(index["weight_map"]) == sorted(Checkpoint(base).names)
    assert [at for at, _ in done] == sorted(at for at, _ in done) and done[-1][0] == done[-1][1] == index["metadata"][
        "total_size"
    ]
    assert load_tokenizer(tmp_path / "out").chat_template == CHATML
    whole = merge_checkpoint(adapter, tmp_path / "whole", base=base)
    assert_equal(load_model(tmp_path / "out", quant_type=None), load_model(tmp_path / "whole", quant_type=None))
    assert whole.share > 0.99


def test_modules_that_the_adapter_holds_whole(base: Path, tmp_path: Path) -> None:
    """As PEFT writes them for modules_to_save."""
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    new = torch.randn(32)
    tensors["base_model.model.model.norm.weight"] = new
    save_file(tensors, adapter / "adapter_model.safetensors")
    merge_checkpoint(adapter, tmp_path / "out")
    assert torch.equal(Checkpoint(tmp_path / "out").read("model.norm.weight"), new.bfloat16())


class TestRefusals:
    def refused(self, kind: type[LorakitError], message: str, adapter: Path, target: Path, **arguments: Any) -> None:
        before = sorted(target.parent.iterdir())
        with pytest.raises(kind, match=message):
            merge_checkpoint(adapter, target, **arguments)
        assert sorted(target.parent.iterdir()) == before

    def test_targets_and_bases(self, base: Path, tmp_path: Path) -> None:
        adapter = write_adapter(tmp_path / "adapter", base)
        target = tmp_path / "out"
        self.refused(StorageError, "adapter exists already", adapter, adapter)
        self.refused(CheckpointError, "nowhere", adapter, target, base=tmp_path / "nowhere")
        self.refused(AdapterError, "holds no adapter", base, target)
        quantize_checkpoint(base, tmp_path / "nf4")
        self.refused(ConfigError, "in 4 bits already", adapter, target, base=tmp_path / "nf4")
        nothing = QuantConfig(quant_type=None)
        self.refused(ConfigError, "nothing would be quantized", adapter, target, quantize=nothing)
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
        self.refused(ConfigError, "names no base model", adapter, target)
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "gone/model"}))
        self.refused(CheckpointError, "base model of its config is not here.*gone/model", adapter, target)

    @pytest.mark.parametrize(
        ("key", "shape", "message"),
        [
            (
                "model.layers.0.self_attn.q_porj.lora_A.weight",
                (4, 32),
                "q_porj.weight is not in the base; did you mean",
            ),
            ("model.embed_tokens.token_adapter.trainable_tokens_delta", (2, 32), "has no place in a checkpoint"),
            ("model.norm.weight", (31,), r"model.norm.weight has shape \(31,\), the base has \(32,\)"),
        ],
    )
    def test_what_has_no_place(
        self, key: str, shape: tuple[int, ...], message: str, base: Path, tmp_path: Path
    ) -> None:
        adapter = write_adapter(tmp_path / "adapter", base, target_modules=["v_proj"])
        tensors = load_file(adapter / "adapter_model.safetensors")
        tensors[f"base_model.model.{key}"] = torch.zeros(shape)
        if key.endswith("lora_A.weight"):
            tensors[f"base_model.model.{key.replace('_A', '_B')}"] = torch.zeros(32, 4)
        save_file(tensors, adapter / "adapter_model.safetensors")
        self.refused(AdapterError, message, adapter, tmp_path / "out")

    def test_a_base_of_another_size(self, base: Path, tmp_path: Path) -> None:
        other = write_checkpoint(tmp_path / "other", small_decoder(hidden_size=64), small_config(hidden_size=64))
        adapter = write_adapter(tmp_path / "adapter", base)
        message = r"layers.\d.\w+.\w_proj: the adapter is for a weight of shape \(\d+, \d+\), not"
        self.refused(AdapterError, message.replace(r"\w_proj", r"\w+_proj"), adapter, tmp_path / "out", base=other)

    def test_overflow(self, base: Path, tmp_path: Path) -> None:
        adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
        tensors = {name: tensor * 1e25 for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
        save_file(tensors, adapter / "adapter_model.safetensors")
        self.refused(AdapterError, "q_proj: the merged weight would hold inf or nan", adapter, tmp_path / "out")
