"""4-bit folders, both ways: what we write opens in transformers with bitsandbytes, and what they write opens here.

Their model is kept in train mode: an eval forward on the CPU repacks their weights in place, and what is dequantized or
saved after that is wrong.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import SMOLLM2, assert_alike
from torch import Tensor, nn

from lorakit import Decoder, Linear4bit, load_model
from lorakit.models.quantize_checkpoint import quantize_checkpoint
from lorakit.quantization.policy import QuantConfig

transformers = importlib.import_module("transformers")
bnb = importlib.import_module("bitsandbytes")

SHARD_BYTES = 40_000_000  # three shards


@pytest.fixture(scope="module")
def ours(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as `lorakit quantize` writes it by default, in shards."""
    target = tmp_path_factory.mktemp("ours") / "nf4"
    quantize_checkpoint(smollm2_folder, target, shard_bytes=SHARD_BYTES)
    assert len(list(target.glob("*.safetensors"))) == 3
    return target


def test_dequantized_weights_are_equal(ours: Path) -> None:
    assert compare(load_model(ours), their_load(ours)) == 210


MIXED = QuantConfig(
    quant_type="fp4",
    block_size=32,
    double_quant=False,
    storage_dtype="bfloat16",
    skip=("lm_head", r"layers\.1\.mlp\..*"),
    overrides={"v_proj": {"quant_type": "nf4", "double_quant": True}, "down_proj": {"block_size": 512}},
)


def test_types_and_block_sizes_may_differ_from_layer_to_layer(smollm2_folder: Path, tmp_path: Path) -> None:
    """All that they need is in each weight's own state; config.json names only what most layers have."""
    written = quantize_checkpoint(smollm2_folder, tmp_path / "mixed", MIXED)
    assert not written.misaligned  # else their CPU kernel is wrong
    theirs = their_load(written.folder)
    assert compare(load_model(written.folder), theirs) == 207
    layer = theirs.model.layers[2]
    states = [m.weight.quant_state for m in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.mlp.down_proj)]
    seen = [(state.quant_type, state.blocksize, state.nested) for state in states]
    assert seen == [("fp4", 32, False), ("nf4", 32, True), ("fp4", 512, False)]
    assert layer.mlp.up_proj.weight.dtype == torch.bfloat16
    assert type(theirs.model.layers[1].mlp.up_proj) is nn.Linear


def test_logits_are_equal(ours: Path, license_ids: list[int]) -> None:
    """In fp32: to the order of additions. In bf16: to the rounding of thirty layers.

    In bf16 (8 significant bits, a rounding error of up to 0.4%) a difference is a sum of hundreds of roundings in other
    places. Each library's logits are about 3% (relative RMS) from fp32's on this text, and nearly as far without
    quantization, so the two may be sqrt(2) * 3% = 4% from each other; 3.1% were seen.
    """
    ids = torch.tensor([license_ids[:96]])
    theirs = their_load(ours)
    assert theirs.dtype == torch.bfloat16
    with torch.inference_mode():
        bf16, their_bf16 = load_model(ours)(ids), theirs(ids).logits
        fp32 = load_model(ours, dtype=torch.float32)(ids)
        their_fp32 = in_fp32(theirs)(ids).logits
    assert bf16.dtype == their_bf16.dtype == torch.bfloat16
    assert fp32.dtype == their_fp32.dtype == torch.float32
    assert_alike(fp32, their_fp32, SMOLLM2)
    assert distance(bf16.float(), fp32) < 0.04
    assert distance(bf16.float(), their_bf16.float()) < 0.045


@pytest.mark.parametrize(
    ("settings", "max_shard_size"),
    [
        ({"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, "40MB"),
        ({"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}, "5GB"),
        (
            {
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
                "bnb_4bit_quant_storage": torch.bfloat16,
                "llm_int8_skip_modules": ["lm_head", "o_proj"],
            },
            "5GB",
        ),
    ],
    ids=["nf4-nested-shards", "fp4-plain", "nf4-bf16-storage-skips"],
)
def test_what_they_save_is_read(
    smollm2_folder: Path, settings: dict[str, Any], max_shard_size: str, tmp_path: Path
) -> None:
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **settings)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_folder, quantization_config=config, dtype=torch.bfloat16
    ).train()
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "40MB")
    skipped = 30 if "llm_int8_skip_modules" in settings else 0
    assert compare(load_model(tmp_path), theirs) == 210 - skipped
    dense = load_model(tmp_path, quant_type=None)
    assert not any(isinstance(module, Linear4bit) for module in dense.modules())
    layer, their_layer = dense.model.layers[29].mlp.down_proj, theirs.model.layers[29].mlp.down_proj
    assert same_bits(layer.weight, their_values(their_layer))


def their_load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).train()


def their_values(layer: Any) -> Tensor:
    assert isinstance(layer, bnb.nn.Linear4bit)
    values: Tensor = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return values


def in_fp32(theirs: nn.Module) -> nn.Module:
    """Compute in fp32 from now on. (transformers forbids `.float()` on every quantized model.)"""
    for module in theirs.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = torch.float32
    return nn.Module.float(theirs)


def compare(ours: Decoder, theirs: nn.Module) -> int:
    """Check that both have the same modules in 4 bits and equal weights in all; return how many are in 4 bits."""
    count = 0
    for path, module in theirs.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            layer = ours.get_submodule(path)
            assert isinstance(layer, Linear4bit), path
            assert same_bits(layer.dense_weight(torch.bfloat16), their_values(module)), path
            count += 1
        elif isinstance(getattr(module, "weight", None), Tensor):
            assert torch.equal(ours.get_submodule(path).weight, module.weight), path
    return count


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality of bytes, stricter than of values: 0.0 is not -0.0."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def distance(a: Tensor, b: Tensor) -> float:
    """Relative RMS difference."""
    return float((a - b).norm() / b.norm())
