"""A model family's own parts: its MLP, its norms, its switches, its form in GGUF."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import gguf
import lorakit_kernels as kernels
import pytest
import torch
from made import write_checkpoint
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import gelu
from toy_family import CONFIG, TOY

import lorakit as lk
from lorakit.adapters.exports import export_adapter
from lorakit.errors import AdapterError, ConfigError
from lorakit.layers import RMSNorm
from lorakit.models import FAMILIES, DecoderConfig
from lorakit.models.decoder.blocks import Attention


class OffsetNorm(RMSNorm):
    """A norm whose weight is stored as its distance from one."""

    def forward(self, x: Tensor) -> Tensor:
        y, _ = kernels.rms_norm(x, 1 + self.weight, self.eps)
        return y


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setitem(FAMILIES, TOY.architecture, TOY)
        yield


def small(config: Mapping[str, Any] = CONFIG) -> lk.Decoder:
    torch.manual_seed(0)
    model = lk.Decoder(DecoderConfig.from_dict(config))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()  # as the checkpoint stores it
    return model.requires_grad_(False).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "toy", small(), CONFIG)


def ids() -> Tensor:
    return torch.randint(400, (2, 9), generator=torch.Generator().manual_seed(1))


def by_hand(model: lk.Decoder, x: Tensor) -> Tensor:
    """The first MLP of a model in float64."""
    mlp: Any = model.model.layers[0].mlp
    return gelu(x.double() @ mlp.fc1.weight.double().T, approximate="tanh") @ mlp.fc2.weight.double().T


def test_its_own_mlp_computes() -> None:
    model, x = small(), torch.randn(5, 32)
    error = (model.model.layers[0].mlp(x) - by_hand(model, x)).abs().max()
    assert error < 32 * torch.finfo(torch.float32).eps * by_hand(model, x).abs().max()


def test_its_switches_are_read_from_its_own_values() -> None:
    assert DecoderConfig.from_dict(CONFIG).qk_norm
    assert not DecoderConfig.from_dict({**CONFIG, "query_norm": False}).qk_norm
    with pytest.raises(ConfigError, match="lacks 'query_norm', which ToyForCausalLM needs"):
        DecoderConfig.from_dict({key: value for key, value in CONFIG.items() if key != "query_norm"})
    with pytest.raises(ConfigError, match=r"hidden_act 'silu' is not supported \(known: gelu_pytorch_tanh\)"):
        DecoderConfig.from_dict({**CONFIG, "hidden_act": "silu"})


def test_a_norm_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Normed(Attention):
        norm: ClassVar[type[RMSNorm]] = OffsetNorm

    plain = small()
    monkeypatch.setitem(FAMILIES, "OffsetForCausalLM", dataclasses.replace(TOY, norm=OffsetNorm, attention=Normed))
    offset = small({**CONFIG, "architectures": ["OffsetForCausalLM"]})
    for name, parameter in offset.named_parameters():
        if "norm" in name:
            parameter.data -= 1
    assert torch.equal(offset(ids()), plain(ids()))


def test_it_loads(folder: Path) -> None:
    assert torch.equal(lk.load_model(folder, quant_type=None, dtype=torch.float32)(ids()), small()(ids()))
    quantized: Any = lk.load_model(folder)
    assert isinstance(quantized.model.layers[1].mlp.fc2, lk.Linear4bit)


def test_checkpointing_changes_nothing() -> None:
    def gradients(how: Any) -> list[Tensor]:
        model = small()
        lk.add_adapter(model, lk.LoraConfig(r=4, init_lora_weights=False))
        model.train().set_checkpointing(how)
        torch.manual_seed(2)
        model(ids()).square().sum().backward()
        return [parameter.grad for parameter in lk.adapter_parameters(model) if parameter.grad is not None]

    kept = gradients("none")
    assert kept
    assert all(map(torch.equal, kept, gradients("layer")))
    assert all(map(torch.equal, kept, gradients("mlp")))


def test_it_is_exported_in_its_gguf_form(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lk.load_model(folder, quant_type=None, dtype=torch.float32)
    lk.add_adapter(model, lk.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    adapter = lk.save_adapter(model, tmp_path / "adapter")
    reader = gguf.GGUFReader(export_adapter(adapter, tmp_path / "adapter.gguf", "llama.cpp", base=folder))
    assert reader.fields["general.architecture"].contents() == "llama"
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    stored = load_file(adapter / "adapter_model.safetensors")
    lora_b = stored["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    assert not torch.equal(tensors["blk.0.attn_q.weight.lora_b"], lora_b)  # permuted
    assert torch.equal(tensors["blk.0.attn_q.weight.lora_b"].sort(0).values, lora_b.sort(0).values)

    monkeypatch.setitem(FAMILIES, TOY.architecture, dataclasses.replace(TOY, gguf=None))
    with pytest.raises(AdapterError, match="'ToyForCausalLM' cannot be exported to llama"):
        export_adapter(adapter, tmp_path / "adapter.gguf", "llama.cpp", base=folder)


def test_without_its_entry_it_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FAMILIES, TOY.architecture)
    assert json.loads((folder / "config.json").read_text())["architectures"] == [TOY.architecture]
    with pytest.raises(ConfigError, match="architecture 'ToyForCausalLM' is not supported"):
        lk.load_model(folder)


def test_one_module_of_each_name() -> None:
    names = {name.rpartition(".")[2] for name, module in small().named_modules() if isinstance(module, nn.Linear)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "lm_head"}
