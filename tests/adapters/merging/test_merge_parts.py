"""Merging every kind of part that an adapter can have: the function stays, and comes apart again to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from made import IDS, full_snapshot, small_decoder
from tolerances import SMALL_DECODER, assert_alike, assert_within, rounding
from torch import Tensor, nn

from lorakit import (
    Linear4bit,
    LoraConfig,
    adapter_parameters,
    add_adapter,
    disable_adapters,
    merge_adapter,
    unmerge_adapter,
)
from lorakit.errors import AdapterError
from lorakit.layers import AdapterModule

# Roundings through all of `Parts`: sums over 24 inputs of the convolution and 4 tokens, twice 64, twice 64 of the norm,
# 64 and 48 of the experts (and two of them), 5 of each adapter and its weight.
TERMS = 24 + 4 + 4 * 64 + 64 + 48 + 2 + 6 * 5


class Experts(nn.Module):
    """Two experts' matrices in one parameter each, used one inside the other."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 48, 64))
        self.down = nn.Parameter(torch.randn(2, 32, 48))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bi,eoi->beo", x, self.up).relu()
        return torch.einsum("bei,eoi->bo", hidden, self.down)


class Parts(nn.Module):
    """One of each kind of module that an adapter can have a part in."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.conv = nn.Conv1d(8, 64, kernel_size=3, padding=1)
        self.linear = nn.Linear(64, 64)
        self.plain = nn.Linear(64, 64, bias=False)
        self.norm = nn.LayerNorm(64)
        self.experts = Experts()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.table(ids).transpose(-1, -2)).mean(-1)
        return self.experts(self.norm(self.plain(self.linear(x)).relu()))


TOKENS = torch.tensor([[1, 2, 3, 19], [4, 4, 0, 1]])
SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["linear", "plain"]},
    "embedding": {"target_modules": ["table"]},
    "convolution": {"target_modules": ["conv"]},
    "dora": {"target_modules": ["conv", "linear"], "use_dora": True},
    "experts": {"target_modules": [], "target_parameters": ["experts.up", "experts.down"]},
    "one of the experts": {"target_modules": ["linear"], "target_parameters": ["experts.down"]},
    "bias of B": {"target_modules": ["linear"], "lora_bias": True},
    "trained biases": {"target_modules": ["linear", "plain"], "bias": "lora_only"},
    "all biases": {"target_modules": ["linear"], "bias": "all"},
    "copies": {"target_modules": ["linear"], "modules_to_save": ["norm", "plain"]},
    "rows": {"target_modules": ["linear"], "trainable_token_indices": {"table": [4, 1]}},
    "pissa": {"target_modules": ["linear"], "init_lora_weights": "pissa"},
}


class TestKindsOfParts:
    def model(self, case: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        model = Parts().to(dtype).requires_grad_(False).eval()
        add_adapter(model, LoraConfig(r=4, lora_alpha=8, **({"init_lora_weights": False} | SETTINGS[case])))
        for parameter in adapter_parameters(model):
            parameter.data += 0.1 * torch.randn_like(parameter)
        return model

    @pytest.mark.parametrize("case", SETTINGS)
    def test_merging_keeps_the_function_and_reversing_it_the_bytes(self, case: str) -> None:
        model = self.model(case)
        expected, before, parameters = model(TOKENS), full_snapshot(model), adapter_parameters(model)
        with disable_adapters(model):
            assert (model(TOKENS) - expected).abs().max() > 1e-2
        report = merge_adapter(model)
        assert not any(isinstance(module, AdapterModule) for module in model.modules())
        assert_alike(model(TOKENS), expected, TERMS)
        for layer in report.layers:  # a change of the weight is off by a rounding of the weight, 1 / relative of it
            assert_within(layer.share, 1.0, 2 * rounding(2, 1 + 1 / layer.relative))
        assert len(report.layers) == len({layer.path for layer in report.layers})
        unmerge_adapter(model)
        assert full_snapshot(model) == before
        assert all(a is b for a, b in zip(adapter_parameters(model), parameters, strict=True))
        assert torch.equal(model(TOKENS), expected)

    @pytest.mark.parametrize("case", SETTINGS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_bytes_of_other_dtypes(self, case: str, dtype: torch.dtype) -> None:
        model = self.model(case, dtype)
        before = full_snapshot(model)
        merge_adapter(model)
        assert model(TOKENS).dtype == dtype
        unmerge_adapter(model)
        assert full_snapshot(model) == before

    def test_a_bias_that_the_layer_did_not_have(self) -> None:
        torch.manual_seed(0)
        model = Parts().requires_grad_(False)
        add_adapter(model, LoraConfig(r=2, target_modules=["plain"], lora_bias=True, init_lora_weights=False))
        for parameter in adapter_parameters(model):
            parameter.data += 0.1
        expected = model(TOKENS)
        merge_adapter(model)
        assert model.plain.bias is not None
        assert_alike(model(TOKENS), expected, TERMS)
        unmerge_adapter(model)
        assert model.plain.base_layer.bias is None

    @pytest.mark.parametrize("is_4bit", [False, True])
    @pytest.mark.parametrize("quantize", [False, True])
    def test_a_new_bias_has_the_dtype_of_the_weight(self, is_4bit: bool, quantize: bool) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
        if is_4bit:
            model[0] = Linear4bit.from_linear(model[0])
        add_adapter(model, LoraConfig(r=2, target_modules=["0"], lora_bias=True, init_lora_weights=False))
        x = torch.randn(3, 64, dtype=torch.bfloat16)
        before, bias = model(x), model[0].delta_bias("default").bfloat16()
        merge_adapter(model, quantize=quantize)
        assert torch.equal(model[0].bias, bias)
        assert model(x).dtype == torch.bfloat16
        unmerge_adapter(model)
        assert model[0].base_layer.bias is None
        assert torch.equal(model(x), before)

    @pytest.mark.parametrize("quantize", [False, True])
    def test_a_bias_beside_4_bits_was_not_shared(self, quantize: bool) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(Linear4bit.from_linear(nn.Linear(64, 64)))
        add_adapter(model, LoraConfig(r=2, target_modules=["0"], lora_bias=True, init_lora_weights=False))
        assert merge_adapter(model, quantize=quantize).notes == []

    def test_two_copies_of_one_module_have_no_sum(self) -> None:
        model = self.model("copies")
        add_adapter(model, LoraConfig(r=2, **SETTINGS["copies"]), "b")
        before = full_snapshot(model)
        with pytest.raises(AdapterError, match="default, b each have a copy of this module"):
            merge_adapter(model, ["default", "b"])
        assert full_snapshot(model) == before

    def test_two_adapters_rows_of_one_token_have_no_sum(self) -> None:
        model = self.model("rows")
        add_adapter(model, LoraConfig(r=2, target_modules=["plain"], trainable_token_indices={"table": [1]}), "b")
        before = full_snapshot(model)
        with pytest.raises(AdapterError, match="rows of the same tokens"):
            merge_adapter(model, ["default", "b"])
        assert full_snapshot(model) == before

    def test_a_tied_head_stays_tied_to_the_rows_it_followed(self) -> None:
        model = small_decoder(tie_word_embeddings=True)
        add_adapter(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 99]))
        for parameter in adapter_parameters(model):
            parameter.data += 0.1 * torch.randn_like(parameter)
        expected = model(IDS)
        report = merge_adapter(model)
        assert_alike(model(IDS), expected, SMALL_DECODER)
        assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
        assert not report.notes
        unmerge_adapter(model)
        assert torch.equal(model(IDS), expected)
