"""A new variant is one definition and one line in the table: it trains, is saved, loaded, merged, measured, planned."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_models import conversations, small_decoder, small_tokenizer
from torch import Tensor

import lorakit as lk
from lorakit.adapters import combine_adapters, lora_layers
from lorakit.errors import AdapterError, ConfigError
from lorakit.layers import VARIANTS, AttachedAdapter, FrozenWeight, Variant

IDS = torch.arange(24).view(2, 12) + 100


class Weighted(Variant):
    """W + s diag(1 + c) B A with one more trained vector c, zero at the start."""

    name = "weighted"
    title = "weighted LoRA"
    meaning = "an update whose rows have weights"
    trained = ("row_weights",)
    is_fused = False

    def start(self, layer: FrozenWeight, adapter: AttachedAdapter) -> dict[str, Tensor]:
        return {"row_weights": torch.zeros(layer.out_features, dtype=adapter.lora_A.dtype)}

    def update(self, layer: FrozenWeight, adapter: AttachedAdapter, x: Tensor) -> Tensor:
        return adapter.scaling * layer.low_rank(adapter.lora_A, self.weighted(adapter), x)

    def factors(self, adapter: AttachedAdapter) -> tuple[Tensor, Tensor]:
        return adapter.scaling * self.weighted(adapter), adapter.lora_A

    def weighted(self, adapter: AttachedAdapter) -> Tensor:
        return (1 + adapter.parameters["row_weights"][:, None]) * adapter.lora_B


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Iterator[lk.LoraConfig]:
    monkeypatch.setitem(VARIANTS, "weighted", Weighted())
    yield lk.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], variant="weighted")


def test_it_does_all_that_an_adapter_does(config: lk.LoraConfig, tmp_path: Path) -> None:
    model, fresh, tok = small_decoder(), small_decoder(), small_tokenizer(tmp_path)
    lk.add_adapter(model, config)
    lk.train(model, tok, conversations(8), lk.TrainConfig(batch_size=4, max_steps=2, lr=0.1, output=tmp_path / "run"))
    assert all(layer.row_weights["default"].any() for layer in lora_layers(model).values())
    expected = model(IDS)
    lk.save_adapter(model, tmp_path / "adapter")
    assert any(key.endswith("q_proj.row_weights") for key in load_file(tmp_path / "adapter/adapter_model.safetensors"))
    lk.load_adapter(fresh, tmp_path / "adapter")
    torch.testing.assert_close(fresh(IDS), expected)
    with pytest.raises(AdapterError, match="variant 'weighted': an update whose rows have weights"):
        lk.save_adapter(model, tmp_path / "export", target="vllm")
    live, read = lk.inspect_adapter(model), lk.inspect_adapter(tmp_path / "adapter", base=small_decoder())
    for ours, theirs in zip(live.layers, read.layers, strict=True):
        assert ours.singular_values == pytest.approx(theirs.singular_values, rel=1e-6)
    combine_adapters(fresh, {"default": 1.0}, "same")
    torch.testing.assert_close(fresh(IDS), expected, rtol=1e-4, atol=1e-5)
    lk.merge_adapter(model)
    torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-5)
    lk.unmerge_adapter(model)
    assert torch.equal(model(IDS), expected)
    plan = lk.plan(model.config, config, lk.TrainConfig(), sequence_length=16)
    assert plan.trainable == sum(p.numel() for p in lk.adapter_parameters(model))


def test_peft_refuses_its_files(config: lk.LoraConfig, tmp_path: Path) -> None:
    """It would read plain LoRA, and say nothing."""
    model = small_decoder()
    lk.add_adapter(model, config)
    lk.save_adapter(model, tmp_path / "adapter")
    assert '"peft_type": "LORAKIT"' in (tmp_path / "adapter/adapter_config.json").read_text()


def test_what_is_not_in_the_table_is_refused(config: lk.LoraConfig) -> None:
    with pytest.raises(ConfigError, match="did you mean 'weighted'"):
        lk.LoraConfig(variant="weihgted")
    with pytest.raises(ConfigError, match="PEFT has a setting of its own for 'dora': use_dora=true"):
        lk.LoraConfig(variant="dora")
    with pytest.raises(ConfigError, match="use_dora and variant 'weighted' exclude each other"):
        lk.LoraConfig(variant="weighted", use_dora=True)
    with pytest.raises(ConfigError, match="'residual' is not a variant"):
        lk.LoraConfig(variant="residual")
