"""Merged checkpoints: the weights of the merged model to the bit, in whole folders, and every refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from made import CHATML, small_config, small_decoder, write_checkpoint
from safetensors.torch import load_file, save_file
from tolerances import rounding
from torch import nn

from lorakit import (
    LoraConfig,
    adapter_parameters,
    add_adapter,
    load_adapter,
    load_model,
    load_tokenizer,
    merge_adapter,
    save_adapter,
)
from lorakit.adapters import merge_checkpoint
from lorakit.errors import AdapterError, CheckpointError, ConfigError, LorakitError, StorageError
from lorakit.models import Checkpoint
from lorakit.models.quantize_checkpoint import quantize_checkpoint
from lorakit.quantization.policy import QuantConfig

IDS = torch.tensor([[1, 5, 99, 17, 3, 250]])
ALL_LINEAR = ("plain", "rslora", "dora", "hira", "head")
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 1}},
    "dora": {"use_dora": True},
    "hira": {"variant": "hira"},
    "head": {"target_modules": r".*(_proj|lm_head)"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding with dora": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "embedding with hira": {"target_modules": ["embed_tokens", "q_proj"], "variant": "hira"},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "a trained head": {"modules_to_save": ["lm_head"], "ensure_weight_tying": False},
    "a trained embedding": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": False},
    "both trained": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "trained norms": {"modules_to_save": ["norm", "input_layernorm"]},
    **{
        start: {"init_lora_weights": start, "target_modules": ["embed_tokens", "down_proj"]}
        for start in ("pissa", "pissa_niter_4", "milora", "olora", "orthogonal", "gaussian")
    },
}


def write_adapter(folder: Path, base: Path, **settings: Any) -> Path:
    model = load_model(base)
    torch.manual_seed(0)
    add_adapter(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **settings}))
    for parameter in adapter_parameters(model):
        parameter.data += 0.05 * torch.randn_like(parameter)
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
    # Where every linear layer is adapted, the merge also takes the 4-bit model to its 16-bit base.
    model = load_model(base, "nf4" if quantized or case in ALL_LINEAR else None)
    load_adapter(model, adapter)
    expected = merge_adapter(model, quantize=quantized)
    loaded = load_model(tmp_path / "out", quant_type="nf4" if quantized else None)
    assert_equal(loaded, model)
    assert torch.equal(loaded(IDS), model(IDS))
    assert loaded.config == model.config
    shares = {layer.path: layer.share for layer in report.layers}
    # Sums in float64 over as many numbers as the largest weight has; the last bit depends on where in memory it lies.
    bound = 2 * float(rounding(max(p.numel() for p in model.parameters()), 1.0, torch.float64))
    assert shares == pytest.approx(
        {layer.path: layer.share for layer in expected.layers if layer.how != "copied"}, rel=bound
    )
    unties = case in ("head", "a trained head", "a trained embedding") or "embed_tokens" in CASES[case].get(
        "target_modules", ()
    )
    is_parted = unties and Checkpoint(base).config()["tie_word_embeddings"]
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


class Kernels(nn.Module):
    """Convolutions of every number of dimensions, and a table, as other models have them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(20, 6)
        self.one = nn.Conv1d(6, 8, 3, stride=2, padding=1)
        self.two = nn.Conv2d(6, 8, (3, 2), dilation=2, bias=False)
        self.three = nn.Conv3d(6, 8, 2)
        self.point = nn.Conv2d(6, 8, 1)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_convolutions(dtype: torch.dtype, settings: dict[str, Any], tmp_path: Path) -> None:
    model = Kernels().to(dtype)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"architectures": ["Kernels"]}))
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    targets = ["one", "two", "three", "point"] + ["table"] * (not settings)
    add_adapter(model, LoraConfig(**{"r": 2, "init_lora_weights": False, "target_modules": targets} | settings))
    for parameter in adapter_parameters(model):
        parameter.data += 0.05 * torch.randn_like(parameter)
    adapter = save_adapter(model, tmp_path / "adapter")
    merge_checkpoint(adapter, tmp_path / "out", base=tmp_path / "base")
    merged = Kernels().to(dtype)
    load_adapter(merged, adapter)
    merge_adapter(merged)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == Kernels().state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in merged.state_dict().items())
    assert not torch.equal(found["two.weight"], Kernels().to(dtype).two.weight)


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("tying", [False, True])
def test_copies_of_tables(name: str, tying: bool, base: Path, tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj"], "modules_to_save": [name], "ensure_weight_tying": tying}
    adapter = write_adapter(tmp_path / "adapter", base, **settings)
    tensors = load_file(adapter / "adapter_model.safetensors")
    new = torch.randn(next(tensor.shape for key, tensor in tensors.items() if key.endswith(f"{name}.weight")))
    tensors |= {key: new.clone() for key in tensors if "lora" not in key}
    save_file(tensors, adapter / "adapter_model.safetensors")
    merge_checkpoint(adapter, tmp_path / "out")
    model = load_model(base, quant_type=None, dtype=torch.bfloat16)
    load_adapter(model, adapter)
    merge_adapter(model)
    loaded = load_model(tmp_path / "out", quant_type=None, dtype=torch.bfloat16)
    assert_equal(loaded, model)
    is_tied = Checkpoint(base).config()["tie_word_embeddings"]
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (is_tied and tying)


class TestRefusals:
    @pytest.mark.parametrize(
        "changes",
        [
            {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            {"architectures": ["GPT2LMHeadModel"], "tie_word_embeddings": None},
        ],
    )
    def test_tables_that_only_the_models_class_ties(self, changes: dict[str, Any], base: Path, tmp_path: Path) -> None:
        if "lm_head.weight" in Checkpoint(base).names:
            return
        adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "embed_tokens"])
        config = {key: value for key, value in (Checkpoint(base).config() | changes).items() if value is not None}
        other = tmp_path / "other"
        shutil.copytree(base, other)
        (other / "config.json").write_text(json.dumps(config))
        message = f"model.embed_tokens.weight: {changes['architectures'][0]} may share this table with modules that"
        self.refused(AdapterError, message, adapter, tmp_path / "out", base=other)

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

    def test_a_grouped_convolution(self, tmp_path: Path) -> None:
        grouped = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2, bias=False))
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "config.json").write_text("{}")
        save_file(grouped.state_dict(), tmp_path / "base" / "model.safetensors")
        whole = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False))
        add_adapter(whole, LoraConfig(r=2, target_modules=["0"]))
        adapter = save_adapter(whole, tmp_path / "adapter")
        message = r"0: the adapter is for a weight of shape \(8, 8, 3, 3\), not \(8, 4, 3, 3\)"
        self.refused(AdapterError, message, adapter, tmp_path / "out", base=tmp_path / "base")

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
