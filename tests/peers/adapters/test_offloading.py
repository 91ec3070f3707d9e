"""accelerate keeps weights on disk or in host memory: before adapters are attached, or after."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers as tf
from tolerances import assert_alike
from torch import nn

from lorakit import LoraConfig, adapter_parameters, add_adapter, load_adapter, merge_adapter, save_adapter
from lorakit.errors import AdapterError, CheckpointError

TERMS = 1024  # roundings through two layers of width 48 and the norms of DoRA
IDS = torch.randint(0, 60, (2, 7), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")
SETTINGS: list[dict[str, Any]] = [
    {}, {"use_dora": True}, {"variant": "hira"}, {"init_lora_weights": "pissa"}, {"trainable_token_indices": [1, 2]},
    {"target_modules": ["q_proj", "embed_tokens"]},
]  # fmt: skip


def qwen3() -> nn.Module:
    torch.manual_seed(0)
    config = tf.Qwen3Config(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48,
    )  # fmt: skip
    return tf.Qwen3ForCausalLM(config).eval()


def adapt(model: nn.Module, settings: dict[str, Any]) -> None:
    torch.manual_seed(1)
    add_adapter(model, LoraConfig(r=4, **settings))
    for parameter in adapter_parameters(model):
        parameter.data += 0.1 * torch.randn_like(parameter)


def offload(model: nn.Module, how: str, folder: Path) -> None:
    if how == "disk":
        accelerate.disk_offload(model, str(folder), execution_device=CPU)
    elif how == "memory":
        accelerate.cpu_offload(model, execution_device=CPU)
    else:
        devices = dict.fromkeys(
            ("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
        )
        accelerate.dispatch_model(
            model, devices | {"model.layers.0": "disk"}, main_device="cpu", offload_dir=str(folder)
        )


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("how", ["disk", "memory", "map"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@torch.no_grad()
def test_offloaded_model(settings: dict[str, Any], how: str, is_late: bool, tmp_path: Path) -> None:
    model, plain = qwen3(), qwen3()
    adapt(plain, settings)
    if is_late:
        offload(model, how, tmp_path)
        adapt(model, settings)
    else:
        adapt(model, settings)
        offload(model, how, tmp_path)
    assert_alike(model(input_ids=IDS).logits, plain(input_ids=IDS).logits, TERMS)
    with pytest.raises(AdapterError, match="its weights are on disk or in host memory"):
        merge_adapter(model, base=False)
    assert_alike(model(input_ids=IDS).logits, plain(input_ids=IDS).logits, TERMS)


def test_weights_that_are_elsewhere_are_not_copied(tmp_path: Path) -> None:
    model = qwen3()
    offload(model, "disk", tmp_path)
    modules = [id(module) for module in model.modules()]
    with pytest.raises(AdapterError, match="lm_head cannot be copied while its weights are on disk"):
        add_adapter(model, LoraConfig(modules_to_save=["lm_head"], ensure_weight_tying=False))
    assert [id(module) for module in model.modules()] == modules


@torch.no_grad()
def test_weights_come_back(tmp_path: Path) -> None:
    model, plain = qwen3(), qwen3()
    adapt(model, {})
    expected = copy.deepcopy(model)(input_ids=IDS).logits
    offload(model, "disk", tmp_path)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(model(input_ids=IDS).logits, expected)
    merge_adapter(model, base=False)
    assert_alike(model(input_ids=IDS).logits, expected, TERMS)
    assert not torch.allclose(expected, plain(input_ids=IDS).logits, atol=1e-3)


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("how", ["disk", "memory", "map"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_files_of_an_offloaded_model(settings: dict[str, Any], how: str, is_late: bool, tmp_path: Path) -> None:
    """It writes the file of the plain model; it takes that file, and refuses one of another base model."""
    model, plain, other, reader = qwen3(), qwen3(), qwen3(), qwen3()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight *= 1.05
    for each in (plain, other):
        adapt(each, settings)
    if is_late:
        offload(model, how, tmp_path / "weights")
    adapt(model, settings)
    if not is_late:
        offload(model, how, tmp_path / "weights")
    files = [save_adapter(one, tmp_path / name) for name, one in (("ours", model), ("plain", plain), ("other", other))]
    ours, expected = ((folder / "adapter_model.safetensors").read_bytes() for folder in files[:2])
    assert ours == expected
    offload(reader, how, tmp_path / "more weights")
    with pytest.raises(CheckpointError, match=r"another base model of the same shapes: the weights .*up_proj"):
        load_adapter(reader, files[2])
    load_adapter(reader, files[1])
    with torch.no_grad():
        assert_alike(reader(input_ids=IDS).logits, plain(input_ids=IDS).logits, TERMS)
