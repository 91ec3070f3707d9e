"""A grid of adapters against PEFT: every variant, kind of layer, dtype and way of targeting, written by either side.

PEFT writes a random adapter and ours reads it, and the reverse: the same outputs, the same merged weights, the same
names, shapes and dtypes of tensors, and a configuration of the same meaning.
"""

from __future__ import annotations

import copy
import importlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from grid_models import as_decoder, build, inputs
from safetensors.torch import load_file
from tolerances import SMALL_DECODER, assert_alike, assert_alike_in_mean
from torch import Tensor, nn

from lorakit import LoraConfig, add_adapter, load_adapter, remove_adapter, save_adapter
from lorakit.adapters import adapter_parameters, lora_layers
from lorakit.layers import LoRAParameter

peft = importlib.import_module("peft")

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dora": {"use_dora": True},
    "dora-rslora": {"use_dora": True, "use_rslora": True, "lora_alpha": 2},
    "lora-bias": {"lora_bias": True},
    "dropout": {"lora_dropout": 0.1},
}
_LLAMA: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "list": {"target_modules": ["q_proj", "mlp.up_proj", "model.layers.1.self_attn.o_proj"]},
    "regex": {"target_modules": r".*layers\.1\..*(q|gate)_proj"},
    "exclude": {"target_modules": "all-linear", "exclude_modules": ["o_proj", "1.mlp.up_proj"]},
    "layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "layers-pattern": {"target_modules": ["v_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "patterns": {
        "target_modules": ["k_proj", "up_proj"],
        "rank_pattern": {"k_proj": 3, r"layers\.0\.mlp\..*": 6},
        "alpha_pattern": {"up_proj": 5.5, r".*\.1\.self_attn.k_proj": 1},
    },
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7, 11]},
}
_GPT2: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "list": {"target_modules": ["c_attn", "mlp.c_proj"]},
    "embeddings": {"target_modules": ["wte", "wpe", "c_fc"]},
    "patterns": {
        "target_modules": ["c_attn", "c_proj"],
        "rank_pattern": {"attn.c_proj": 3},
        "alpha_pattern": {r"h\.1\..*": 2},
    },
    "layers": {"target_modules": ["c_fc"], "layers_to_transform": [0], "layers_pattern": ["h"]},
    "saved": {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"]},
    "tokens": {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [0, 5]}},
}
_CONV: dict[str, dict[str, Any]] = {
    "two-d": {"target_modules": ["stem", "blocks.0"]},
    "point": {"target_modules": ["blocks.1", "head"]},
    "one-d": {"target_modules": ["line"]},
    "all-kinds": {"target_modules": ["stem", "blocks.0", "blocks.1", "line", "head"], "rank_pattern": {"line": 2}},
    "saved": {"target_modules": ["stem"], "modules_to_save": ["head"]},
}
_MIXTURE: dict[str, dict[str, Any]] = {
    "up": {"target_modules": [], "target_parameters": ["experts.up_proj"]},
    "both": {"target_modules": [], "target_parameters": ["experts.up_proj", "experts.down_proj"]},
    "reversed": {"target_modules": ["first"], "target_parameters": ["experts.down_proj", "experts.up_proj"]},
    "one-layer": {"target_modules": ["last"], "target_parameters": ["layers.1.experts.down_proj"]},
    "patterns": {"target_modules": [], "target_parameters": ["experts.up_proj"], "rank_pattern": {"up_proj": 2}},
}
BIASES: dict[str, dict[str, Any]] = {
    "bias-only": {"bias": "lora_only"},
    "bias-all": {"bias": "all"},
    "bias-dora": {"bias": "lora_only", "use_dora": True},
}


def _cases() -> Iterator[tuple[str, str, dict[str, Any], torch.dtype]]:
    for target, values in _LLAMA.items():
        for variant in ("plain", "dora"):
            yield "llama", f"{target}-{variant}", values | VARIANTS[variant], torch.float32
        if target not in ("saved", "tokens"):  # copies of bf16 modules: PEFT trains them in bf16, ours in fp32
            yield "llama", f"{target}-bf16", values, torch.bfloat16
    for variant in ("rslora", "dora-rslora", "lora-bias", "dropout"):
        yield "llama", f"all-linear-{variant}", _LLAMA["all-linear"] | VARIANTS[variant], torch.float32
    yield "llama", "all-linear-dora-bf16", _LLAMA["all-linear"] | VARIANTS["dora"], torch.bfloat16
    for variant in VARIANTS:
        yield "qwen2", f"all-linear-{variant}", _LLAMA["all-linear"] | VARIANTS[variant], torch.float32
    for target in ("embedding", "tokens", "head"):
        yield "llama-tied", target, _LLAMA[target], torch.float32
    for bias, values in BIASES.items():
        yield "qwen2", bias, {"target_modules": ["q_proj", "o_proj"]} | values, torch.float32
        yield "gpt2", bias, {"target_modules": ["c_attn"]} | values, torch.float32
        yield "conv", bias, {"target_modules": ["stem", "head"]} | values, torch.float32
    for target, values in _GPT2.items():
        for variant in ("plain", "dora", "rslora"):
            yield "gpt2", f"{target}-{variant}", values | VARIANTS[variant], torch.float32
    for target, values in _CONV.items():
        for variant in ("plain", "dora", "rslora"):
            yield "conv", f"{target}-{variant}", values | VARIANTS[variant], torch.float32
    for target, values in _MIXTURE.items():
        for variant in ("plain", "rslora"):
            yield "mixture", f"{target}-{variant}", values | VARIANTS[variant], torch.float32


CASES = {f"{kind}-{label}": (kind, values, dtype) for kind, label, values, dtype in _cases()}
_BASES: dict[tuple[str, torch.dtype], nn.Module] = {}


def test_the_grid_is_a_grid() -> None:
    assert len(CASES) >= 80


def base(kind: str, dtype: torch.dtype) -> nn.Module:
    """Return a fresh copy of a model."""
    if (kind, dtype) not in _BASES:
        _BASES[kind, dtype] = build(kind).to(dtype)
    return copy.deepcopy(_BASES[kind, dtype])


def output(model: nn.Module, kind: str, dtype: torch.dtype) -> Tensor:
    x = inputs(kind)
    with torch.inference_mode():
        y = model(x.to(dtype) if x.is_floating_point() else x)
    return y if isinstance(y, Tensor) else y.logits


@torch.no_grad()
def shake(parameters: list[nn.Parameter]) -> None:
    """Move what starts at a value of the base, as magnitudes, biases and copies do, away from it."""
    draw = torch.Generator().manual_seed(3)
    for parameter in parameters:
        parameter.add_(torch.randn(parameter.shape, generator=draw).to(parameter.dtype) / 20)


@pytest.mark.parametrize("case", CASES)
def test_peft_writes_and_ours_reads(case: str, tmp_path: Path) -> None:
    kind, values, dtype = CASES[case]
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's about fan_in_fan_out, tied weights, embeddings written along
        config = peft.LoraConfig(r=4, init_lora_weights=False, **{"lora_alpha": 6} | values)
        theirs = peft.get_peft_model(base(kind, dtype), config).eval()
        shake([p for p in theirs.parameters() if p.requires_grad])
        theirs.save_pretrained(tmp_path / "theirs")
        expected = output(theirs, kind, dtype)
        merged = None if "lora_bias" in values else theirs.merge_and_unload()  # which it cannot without a bias
    ours = base(kind, dtype)
    plain = output(ours, kind, dtype)
    assert (expected - plain).abs().max() > 1e-2 * plain.abs().max()
    if values.get("bias", "none") != "none":
        assert_base_is_untouched(ours, tmp_path / "theirs")
    load_adapter(ours, tmp_path / "theirs")
    close(output(ours, kind, dtype), expected)
    if dtype == torch.float32 and merged is not None:
        assert_same_weights(ours, merged)
    save_adapter(ours, tmp_path / "ours")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")
    if kind in ("llama", "llama-tied", "qwen2") and dtype == torch.float32:
        decoder = as_decoder(base(kind, dtype))
        load_adapter(decoder, tmp_path / "theirs")
        close(output(decoder, kind, dtype), expected)


@pytest.mark.parametrize("case", CASES)
def test_ours_writes_and_peft_reads(case: str, tmp_path: Path) -> None:
    kind, values, dtype = CASES[case]
    torch.manual_seed(6)
    ours = base(kind, dtype)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    add_adapter(ours, LoraConfig(r=4, init_lora_weights=False, **{"lora_alpha": 6} | values))
    shake(adapter_parameters(ours))
    save_adapter(ours, tmp_path / "ours")
    expected = output(ours, kind, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(base(kind, dtype), tmp_path / "ours").eval()
        expected_names = {key for key in peft.get_peft_model_state_dict(theirs) if not is_table(key)}
    close(output(theirs, kind, dtype), expected)
    assert load_file(tmp_path / "ours" / "adapter_model.safetensors").keys() == expected_names
    remove_adapter(ours)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def close(found: Tensor, expected: Tensor) -> None:
    """A model has at most the roundings of `SMALL_DECODER`, and 6 ranks in 14 layers; in bf16 it stores 30 results."""
    if expected.dtype == torch.float32:
        assert_alike(found, expected, SMALL_DECODER + 14 * 6)
    else:
        assert_alike_in_mean(found, expected, stores=2 * 14 + 2)


def assert_same_weights(ours: nn.Module, merged: nn.Module) -> None:
    """PEFT's merged weight is the base weight and our delta."""
    for path, layer in lora_layers(ours).items():
        inner: nn.Module = layer
        while isinstance(inner, LoRAParameter) and isinstance(inner.base_layer, LoRAParameter):
            inner = inner.base_layer
        where = path.replace(".base_layer", "")
        name = layer.parameter if isinstance(layer, LoRAParameter) else "weight"
        expected = merged.get_submodule(where).get_parameter(name)
        found = layer.base_weight(torch.float32) + layer.delta_weight("default")
        assert found.shape == expected.shape
        # Up to 6 ranks, the scaling, the sum with the base; DoRA's norm over at most 48 inputs, which a root halves.
        assert_alike(found, expected, terms=6 + 2 + 48 // 2 + 3)


def assert_base_is_untouched(ours: nn.Module, folder: Path) -> None:
    """The biases that PEFT trains in place are copies in ours."""
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    load_adapter(ours, folder, "first")
    remove_adapter(ours, "first")
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def assert_same_files(ours: Path, theirs: Path) -> None:
    """The same tensors, and in the configuration the same value under every key that both have."""
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs))
    expected = {key: tensor for key, tensor in expected.items() if not is_table(key)}
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert (tensor.shape, tensor.dtype) == (expected[key].shape, expected[key].dtype), key
        assert torch.equal(tensor, expected[key]), key
    our_config, their_config = (json.loads((folder / "adapter_config.json").read_text()) for folder in (ours, theirs))
    assert our_config.keys() <= their_config.keys()
    for key in our_config.keys() - {"base_model_name_or_path", "init_lora_weights", "task_type", "fan_in_fan_out"}:
        assert ordered(our_config[key]) == ordered(their_config[key]), key


def is_table(key: str) -> bool:
    """Whether a tensor is the frozen table that PEFT writes along with an adapted embedding."""
    return key.endswith(".base_layer.weight")


def ordered(value: Any) -> Any:
    """A list of names has no order; nothing and an empty list are one."""
    return sorted(value, key=str) if isinstance(value, list) else value or None
