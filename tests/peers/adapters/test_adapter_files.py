"""Adapter folders against PEFT: what either writes, the other reads to the same function.

Adapters are random (init_lora_weights=False), so that B takes part.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tolerances import SMOLLM2, assert_alike
from torch import Tensor, nn

from lorakit import (
    Decoder,
    Linear4bit,
    LoraConfig,
    adapter_parameters,
    add_adapter,
    load_adapter,
    load_model,
    save_adapter,
)
from lorakit.adapters import lora_layers
from lorakit.errors import AdapterError

peft = importlib.import_module("peft")

Fresh = Callable[[nn.Module], nn.Module]
LogitsOf = Callable[[nn.Module, Tensor], Tensor]

# Both configurations take the same names.
CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 4, "target_modules": "all-linear"},
    "rslora": {"r": 4, "lora_alpha": 2, "use_rslora": True, "target_modules": "all-linear"},
    "patterns": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2, r"layers\.[0-3]\.self_attn\.q_proj": 6, "v_pro": 16},
        "alpha_pattern": {r"layers\.\d\.mlp\.down_proj": 1, "v_proj": 2.5, "self_attn.q_proj": 3},
    },
    "patterns-rslora": {
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": ["k_proj", "up_proj"],
        "rank_pattern": {"k_proj": 9},
        "alpha_pattern": {"k_proj": 1},
    },
    "list": {"r": 3, "lora_alpha": 4, "target_modules": ["o_proj", "mlp.up_proj", "model.layers.7.self_attn.q_proj"]},
    "regex": {"r": 4, "lora_alpha": 4, "target_modules": r"model\.layers\.(1|2\d)\.(self_attn\.[qv]|mlp\.gate)_proj"},
    "layers": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 3, 29]},
    "one-layer": {"r": 4, "lora_alpha": 16, "target_modules": ["v_proj", "up_proj"], "layers_to_transform": 12},
    "exclude": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": "all-linear",
        "exclude_modules": ["o_proj", "2.mlp.up_proj"],
    },
    "exclude-regex": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "gate_proj"],
        "exclude_modules": r".*\.(1\d|2)\.(self_attn|mlp)\..*",
    },
}


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    torch.manual_seed(len(request.param))
    return CASES[request.param] | {"init_lora_weights": False}


@pytest.fixture(scope="module")
def ids(license_ids: list[int]) -> Tensor:
    return torch.tensor(license_ids[:32]).view(2, 16)


@pytest.fixture(scope="module")
def base_logits(their_model: nn.Module, ids: Tensor, logits_of: LogitsOf) -> Tensor:
    return logits_of(their_model, ids)


def test_ours_in_peft(
    case: dict[str, Any], our_model: Decoder, their_model: nn.Module, fresh: Fresh, ids: Tensor, base_logits: Tensor,
    logits_of: LogitsOf, tmp_path: Path,
) -> None:  # fmt: skip
    ours = fresh(our_model)
    add_adapter(ours, LoraConfig(**case), is_strict=False)  # a pattern of these matches nothing
    save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(fresh(their_model), tmp_path / "adapter").eval()

    assert meaning(ours) == meaning(theirs)
    expected = logits_of(ours, ids)
    assert (expected - base_logits).abs().max() > 0.5
    assert_alike(logits_of(theirs, ids), expected, SMOLLM2)


def test_theirs_in_ours(
    case: dict[str, Any], our_model: Decoder, their_model: nn.Module, fresh: Fresh, ids: Tensor, base_logits: Tensor,
    logits_of: LogitsOf, tmp_path: Path,
) -> None:  # fmt: skip
    theirs = peft.get_peft_model(fresh(their_model), peft.LoraConfig(task_type="CAUSAL_LM", **case)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    expected = logits_of(theirs, ids)
    assert (expected - base_logits).abs().max() > 0.5

    for model in (fresh(our_model), fresh(their_model)):  # our layers in our decoder, and in theirs
        load_adapter(model, tmp_path / "adapter")
        assert meaning(model) == meaning(theirs)
        assert_alike(logits_of(model, ids), expected, SMOLLM2)
        save_adapter(model, tmp_path / "again")
        assert_same_files(tmp_path / "again", tmp_path / "adapter")


def test_ours_on_a_transformers_model_in_peft(
    case: dict[str, Any], their_model: nn.Module, fresh: Fresh, ids: Tensor, logits_of: LogitsOf, tmp_path: Path
) -> None:
    ours = fresh(their_model)
    add_adapter(ours, LoraConfig(**case), is_strict=False)  # a pattern of these matches nothing
    save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(fresh(their_model), tmp_path / "adapter").eval()
    assert meaning(ours) == meaning(theirs)
    assert_alike(logits_of(theirs, ids), logits_of(ours, ids), SMOLLM2)


@pytest.mark.parametrize("target", ["vllm", "tgi"])
def test_exports_in_peft(
    target: str, case: dict[str, Any], our_model: Decoder, their_model: nn.Module, fresh: Fresh, ids: Tensor,
    logits_of: LogitsOf, tmp_path: Path,
) -> None:  # fmt: skip
    """PEFT reads the one scale as they do: 1 for every layer, and TGI's zeros where there was no adapter."""
    ours = fresh(our_model)
    add_adapter(ours, LoraConfig(**case), is_strict=False)
    save_adapter(ours, tmp_path / "export", target=target)
    theirs = peft.PeftModel.from_pretrained(fresh(their_model), tmp_path / "export").eval()
    found, own = meaning(theirs), meaning(ours)
    assert set(own) <= set(found)
    assert set(found.values()) == {(max(rank for rank, _ in own.values()), 1.0)}
    assert all(path.split(".")[-1] in {name.split(".")[-1] for name in own} for path in found)
    assert_alike(logits_of(theirs, ids), logits_of(ours, ids), SMOLLM2)


@pytest.mark.parametrize("targets", ["all-linear", "ALL-LINEAR", r".*\.(q|up)_proj"])
def test_layers_to_transform_with_targets_in_one_string(
    targets: str, our_model: Decoder, their_model: nn.Module, fresh: Fresh, tmp_path: Path
) -> None:
    """PEFT refuses the two together; what we write of them, it takes."""
    with pytest.raises(ValueError, match="layers_to_transform"):
        peft.LoraConfig(target_modules=targets, layers_to_transform=[2, 5])
    ours = fresh(our_model)
    add_adapter(ours, LoraConfig(r=4, target_modules=targets, layers_to_transform=[2, 5]))
    save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(fresh(their_model), tmp_path / "adapter")
    assert meaning(theirs) == meaning(ours)


def test_a_bf16_file_is_fp32_in_peft_each_value_exact(
    our_model: Decoder, their_model: nn.Module, fresh: Fresh, tmp_path: Path
) -> None:
    ours = fresh(our_model)
    add_adapter(ours, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), dtype=torch.bfloat16)
    save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(fresh(their_model), tmp_path / "adapter", is_trainable=True)
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 30
    for path, layer in lora_layers(ours).items():
        theirs_b = trained[f"base_model.model.{path}.lora_B.default.weight"]
        assert theirs_b.dtype == torch.float32
        assert torch.equal(theirs_b, layer.lora_B["default"].float())


@pytest.mark.parametrize("quant_type", [None, "nf4"])
@pytest.mark.parametrize("init", ["pissa", "milora"])
def test_a_start_inside_the_base_in_peft(
    init: str, quant_type: str | None, smollm2_folder: Path, their_model: nn.Module, fresh: Fresh, ids: Tensor,
    logits_of: LogitsOf, tmp_path: Path,
) -> None:  # fmt: skip
    """PEFT reads the file as plain LoRA of twice the rank on the base as it is, whose values it is given in fp32."""
    ours = load_model(smollm2_folder, quant_type=quant_type, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["layers.3.self_attn.k_proj", "layers.20.mlp.down_proj"])
    base = copy.deepcopy(their_model)  # not `fresh`: it gets other weights
    with torch.no_grad():
        for path, module in ours.named_modules():
            if isinstance(module, Linear4bit):
                base.get_submodule(path).weight.copy_(module.dense_weight(torch.float32))
    before = logits_of(base, ids)
    add_adapter(ours, config.model_copy(update={"init_lora_weights": init}))
    assert_alike(logits_of(ours, ids), before, SMOLLM2)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapter_parameters(ours):
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert set(meaning(theirs).values()) == {(8, 1.5)}
    expected = logits_of(ours, ids)
    assert (expected - before).abs().max() > 0.5
    assert_alike(logits_of(theirs, ids), expected, SMOLLM2)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_adapters_of_a_changed_base_are_refused(
    init: str, our_model: Decoder, their_model: nn.Module, fresh: Fresh, tmp_path: Path
) -> None:
    """These take the adapter's start off the base weights, and the file holds only the adapter."""
    whole_copy = copy.deepcopy(their_model)  # not `fresh`: the base is changed in place
    config = peft.LoraConfig(r=2, target_modules=["layers.0.self_attn.k_proj"], init_lora_weights=init)
    peft.get_peft_model(whole_copy, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=f"init_lora_weights.*{init}"):
        load_adapter(fresh(our_model), tmp_path / "adapter")


def meaning(model: nn.Module) -> dict[str, tuple[int, float]]:
    """Return what an adapter does where: module path -> rank, scaling."""
    if isinstance(model, peft.PeftModel):
        layers = {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
        return {n.removeprefix("base_model.model."): (m.r["default"], m.scaling["default"]) for n, m in layers.items()}
    return {n: (len(m.lora_A["default"]), m.scaling["default"]) for n, m in lora_layers(model).items()}


def assert_same_files(ours: Path, theirs: Path) -> None:
    """The same tensors, and in the configuration the same value under every key that both have."""
    our_tensors, their_tensors = (load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs))
    assert our_tensors.keys() == their_tensors.keys()
    for name, tensor in our_tensors.items():
        assert tensor.dtype == their_tensors[name].dtype
        assert torch.equal(tensor, their_tensors[name]), name
    our_config, their_config = (json.loads((folder / "adapter_config.json").read_text()) for folder in (ours, theirs))
    assert our_config.keys() <= their_config.keys()
    for key in our_config.keys() - {"base_model_name_or_path", "init_lora_weights"}:
        assert plain(our_config[key]) == plain(their_config[key]), key


def plain(value: Any) -> Any:
    """A list of names has no order."""
    return sorted(value, key=str) if isinstance(value, list) else value
