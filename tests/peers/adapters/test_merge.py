"""Merging against PEFT: the same logits where PEFT is right, and what its 4-bit merge loses where it is not."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import SMALL_DECODER, SMOLLM2, assert_alike, assert_within, rounding
from torch import Tensor, nn

from lorakit import Decoder, Linear4bit, LoraConfig, add_adapter, load_adapter, load_model, merge_adapter
from lorakit.adapters import lora_layers, merge_checkpoint
from lorakit.adapters.merging.report import share_of
from lorakit.quantization.policy import QuantConfig

peft = importlib.import_module("peft")
bnb = importlib.import_module("bitsandbytes")
transformers = importlib.import_module("transformers")

Fresh = Callable[[nn.Module], nn.Module]
LogitsOf = Callable[[nn.Module, Tensor], Tensor]
CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "dora": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
}


@pytest.fixture(scope="module")
def ids(license_ids: list[int]) -> Tensor:
    return torch.tensor(license_ids[:32]).view(2, 16)


@pytest.fixture
def adapter(request: pytest.FixtureRequest, their_model: nn.Module, fresh: Fresh, tmp_path: Path) -> Path:
    """A random adapter, written by PEFT."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=2, init_lora_weights=False, task_type="CAUSAL_LM", **CASES[request.param])
    peft.get_peft_model(fresh(their_model), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("adapter", CASES, indirect=True)
def test_dense(
    adapter: Path, our_model: Decoder, their_model: nn.Module, fresh: Fresh, ids: Tensor, logits_of: LogitsOf
) -> None:
    # PEFT merges in place: it gets a copy of its own.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(our_model.folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, adapter).merge_and_unload().eval()
    expected = logits_of(theirs, ids)
    weights = theirs.state_dict()
    for model in (fresh(our_model), fresh(their_model)):  # our layers in our decoder, and in theirs
        load_adapter(model, adapter)
        has_norms = any("magnitude" in name for name, _ in model.named_parameters())
        report = merge_adapter(model)
        for layer in report.layers:  # a sum over 4 ranks and the base; of 576 inputs a norm's root halves the roundings
            ours = model.get_submodule(layer.path).weight
            assert_alike(ours, weights[f"{layer.path}.weight"], terms=4 + 4 + 576 // 2 * has_norms)
        assert_alike(logits_of(model, ids), expected, SMOLLM2)


@pytest.mark.parametrize("adapter", ["plain"], indirect=True)
@pytest.mark.parametrize("quantize", [None, QuantConfig()], ids=["dense", "nf4"])
def test_a_merged_checkpoint_in_transformers(
    quantize: QuantConfig | None, adapter: Path, smollm2_folder: Path, ids: Tensor, logits_of: LogitsOf, tmp_path: Path
) -> None:
    merge_checkpoint(adapter, tmp_path / "out", base=smollm2_folder, quantize=quantize)
    ours = load_model(tmp_path / "out", quant_type=quantize and "nf4", dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs.train()  # in eval mode bitsandbytes repacks the weights and rounds their scales
    for layer in theirs.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.compute_dtype = torch.float32
    nn.Module.float(theirs)  # transformers forbids `.float()` on a quantized model
    assert_alike(logits_of(theirs, ids), logits_of(ours, ids), SMOLLM2)
    merged = load_model(smollm2_folder, dtype=torch.bfloat16)
    load_adapter(merged, adapter)
    merge_adapter(merged, quantize=quantize is not None)
    again = load_model(tmp_path / "out", quant_type=quantize and "nf4")
    assert torch.equal(logits_of(again, ids), logits_of(merged, ids))


def their_layer(dense: nn.Linear, **settings: Any) -> Any:
    """PEFT's adapted layer on bitsandbytes' 4 bits, with a random adapter."""
    layer = bnb.nn.Linear4bit(
        dense.in_features, dense.out_features, dense.bias is not None, compute_dtype=torch.float32, quant_type="nf4"
    )
    layer.load_state_dict(dense.state_dict())
    model = nn.Sequential(layer.to("cpu"))
    model.is_loaded_in_4bit = True  # as transformers' models say, or PEFT takes the layer for a dense one
    config = peft.LoraConfig(target_modules=["0"], init_lora_weights=False, **settings)
    return peft.get_peft_model(model, config).base_model.model[0]


def values(layer: Any) -> Tensor:
    result: Tensor = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return result


def test_a_small_update_in_4_bits() -> None:
    """PEFT dequantizes, adds and quantizes again: of an update of 1% nearly nothing is left."""
    torch.manual_seed(0)
    dense = nn.Linear(256, 256, bias=False).requires_grad_(False)
    theirs = their_layer(dense, r=8, lora_alpha=8)
    ours = nn.Sequential(Linear4bit.from_linear(dense))
    add_adapter(ours, LoraConfig(r=8, lora_alpha=8))
    layer = lora_layers(ours)["0"]
    layer.lora_A["default"].data = theirs.lora_A["default"].weight.data
    theirs.lora_B["default"].weight.data *= 0.01 * dense.weight.norm() / theirs.get_delta_weight("default").norm()
    layer.lora_B["default"].data = theirs.lora_B["default"].weight.data
    update, before = layer.delta_weight("default").detach(), values(theirs.base_layer)
    base = layer.base_weight(torch.float32)
    theirs.merge()
    assert share_of(values(theirs.base_layer) - before, update) < 0.1
    report = merge_adapter(ours, quantize=True)
    # The weight with its part of rank 8, less the base: roundings of the whole weight, which is 100 times the update.
    assert_within(report.share, 1.0, 2 * rounding(8 + 4, 1 + 1 / report.layers[0].relative))
    whole = ours[0].dense_weight(torch.float32)
    terms = ours[0].residual_up.abs() @ ours[0].residual_down.abs()
    assert_within(whole - base, update, 2 * rounding(8 + 4, whole.abs() + base.abs() + terms))


def test_the_bias_of_b_in_4_bits() -> None:
    """PEFT adds the bias of lora_B unscaled when it merges into 4 bits; in forward it scales it, as we do in both."""
    torch.manual_seed(0)
    dense = nn.Linear(64, 64).requires_grad_(False)
    theirs = their_layer(dense, r=4, lora_alpha=16, lora_bias=True)
    theirs.lora_B["default"].bias.data.normal_()
    trained, before = theirs.lora_B["default"].bias.detach().clone(), theirs.base_layer.bias.detach().clone()
    ours = nn.Sequential(Linear4bit.from_linear(dense))
    add_adapter(ours, LoraConfig(r=4, lora_alpha=16, lora_bias=True))
    layer = lora_layers(ours)["0"]
    layer.lora_A["default"].data = theirs.lora_A["default"].weight.data.clone()
    layer.lora_B["default"].data = theirs.lora_B["default"].weight.data.clone()
    layer.table("lora_bias")["default"].data = trained.clone()
    x = torch.randn(3, 64)
    expected = ours(x)
    assert_alike(theirs.train()(x), expected, terms=64 + 64 + 4 + 8)
    merge_adapter(ours)
    assert_alike(ours(x), expected, terms=64 + 64 + 4 + 8)
    assert torch.equal(ours[0].bias, before + 4 * trained)
    theirs.merge()
    assert torch.equal(theirs.base_layer.bias, before + trained)


def test_a_head_that_was_tied_is_saved_by_transformers_and_loaded_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=40, tie_word_embeddings=True, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    add_adapter(model, LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    ids = torch.arange(8)[None]
    expected = model(ids).logits
    report = merge_adapter(model)
    assert "lm_head shared its weight with model.embed_tokens" in str(report)
    merged = model(ids).logits
    assert_alike(merged, expected, SMALL_DECODER)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, merged)
