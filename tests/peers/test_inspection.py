"""Inspection of what the peers write: PEFT's adapter folders of every kind, on 16-bit bases and bitsandbytes' 4-bit."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import assert_within, rounding
from torch import Tensor, nn

from lorakit.inspection import AdapterInfo, inspect_adapter

peft = importlib.import_module("peft")
transformers = importlib.import_module("transformers")
dequantized = importlib.import_module("peft.utils.integrations").dequantize_module_weight

LINEAR = ["q_proj", "v_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 16, "target_modules": LINEAR},
    "rslora": {"r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": LINEAR},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": LINEAR},
    "patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": LINEAR,
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 7, "down_proj": 2}, "alpha_pattern": {"v_proj": 3},
    },
    "embeddings": {"r": 4, "lora_alpha": 8, "target_modules": [*LINEAR, "embed_tokens"]},
    "dora embeddings": {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": ["embed_tokens"]},
    "head": {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "modules_to_save": ["lm_head"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def adapted(base: Path, folder: Path, case: dict[str, Any], **loading: Any) -> nn.Module:
    """Write a random adapter of PEFT's, DoRA's magnitudes moved as well, and return its model."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, **loading)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **case)
    model = peft.get_peft_model(model, config).eval()
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.rand_like(parameter)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


def check(info: AdapterInfo, model: nn.Module, is_merged: bool) -> None:
    """Hold norms, spectra and, after a merge, the change of the weight against PEFT's own dense matrices."""
    layers: dict[str, Any] = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert {layer.name for layer in info.layers} == set(layers)
    for layer in info.layers:
        module = layers[layer.name]
        with torch.no_grad():
            delta: Tensor = module.get_delta_weight("default").double()
            before = dequantized(module.get_base_layer()).double().clone()
        # PEFT's update is a sum of up to 7 random directions in fp32, scaled; its terms are sqrt(7) times as large.
        off = rounding(7 + 1, 7**0.5 * delta.norm())
        assert_within(layer.norm, delta.norm(), off)
        s = torch.linalg.svdvals(delta)[: len(layer.singular_values)]
        assert_within(layer.spectrum, s, off)
        assert layer.base is not None
        size = before.norm()
        assert_within(layer.base.base_norm, size, rounding(before.numel(), size, torch.float64))
        if is_merged:  # into fp32: one more rounding of each weight, and of DoRA's norms over at most 128 inputs
            module.merge()
            after = module.get_base_layer().weight.double()
            off = off + rounding(128 // 2 + 6, after.norm())
            assert_within(layer.base.relative_norm, (after - before).norm() / size, 2 * off / size)
        else:
            assert_within(layer.base.relative_norm, delta.norm() / size, 2 * off / size)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_adapters_written_by_peft(case: dict[str, Any], base: Path, tmp_path: Path) -> None:
    model = adapted(base, tmp_path, case, dtype=torch.float32)
    info = inspect_adapter(tmp_path, base=base)
    check(info, model, is_merged=True)
    assert info.extras == (("lm_head.weight",) if "modules_to_save" in case else ())


@pytest.mark.parametrize("settings", [{"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, {}], ids=str)
def test_bases_in_bitsandbytes_4_bits(settings: dict[str, Any], base: Path, tmp_path: Path) -> None:
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **settings)
    loading = {"quantization_config": config, "dtype": torch.float32}
    transformers.AutoModelForCausalLM.from_pretrained(base, **loading).save_pretrained(tmp_path / "4bit")
    model = adapted(base, tmp_path / "adapter", CASES["lora"], **loading)
    check(inspect_adapter(tmp_path / "adapter", base=tmp_path / "4bit"), model, is_merged=False)
