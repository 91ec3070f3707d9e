"""Folders that are in 4 bits already: loaded as they are, and every way they can be wrong is named, not followed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made import ARCHITECTURES, small_config, small_decoder, write_checkpoint, write_weights
from safetensors.torch import load_file, save_file
from tolerances import SMALL_DECODER, assert_alike

from lorakit import Linear4bit, load_model
from lorakit.errors import CheckpointError, ConfigError
from lorakit.models.quantize_checkpoint import quantize_checkpoint
from lorakit.quantization.policy import QuantConfig

IDS = torch.tensor([[5, 17, 300, 2, 41]])
UP = "model.layers.0.mlp.up_proj.weight"
STATE = f"{UP}.quant_state.bitsandbytes__nf4"


def folder_4bit(folder: Path, config: QuantConfig | None = None, **changes: Any) -> Path:
    src = write_checkpoint(folder / "src", small_decoder(**changes), small_config(**changes))
    return quantize_checkpoint(src, folder / "dst", config).folder


def change_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


def refused(folder: Path, error: type[Exception] = CheckpointError, **arguments: Any) -> str:
    with pytest.raises(error) as caught:
        load_model(folder, **arguments)
    return str(caught.value)


# loading


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dequantized_on_loading(architecture: str, tmp_path: Path) -> None:
    folder = folder_4bit(tmp_path, **ARCHITECTURES[architecture])
    packed, dense = load_model(folder, dtype=torch.float32), load_model(folder, quant_type=None, dtype=torch.float32)
    for path, module in packed.named_modules():
        if isinstance(module, Linear4bit):
            assert torch.equal(dense.get_submodule(path).weight, module.dense_weight(torch.float32))
    assert_alike(dense(IDS), packed(IDS), SMALL_DECODER)


def test_parts_of_a_weight_may_be_in_several_shards(tmp_path: Path) -> None:
    folder = folder_4bit(tmp_path, quant := QuantConfig(quant_type="fp4", double_quant=False))
    expected = load_model(tmp_path / "src", quant_config=quant)(IDS)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_weights(folder, tensors, shards=5)
    assert torch.equal(load_model(folder)(IDS), expected)


def test_config_json_need_not_say_it(tmp_path: Path) -> None:
    folder = folder_4bit(tmp_path)
    expected = load_model(folder)(IDS)
    change_config(folder, quantization_config=None)
    assert torch.equal(load_model(folder)(IDS), expected)
    change_config(folder, quantization_config={"load_in_4bit": True})  # as transformers wrote it at first
    assert torch.equal(load_model(folder)(IDS), expected)


# settings that do not fit


@pytest.mark.parametrize(
    "same",
    [
        {},
        {"quant_type": "fp4"},
        {"block_size": 128},
        {"double_quant": False},
        {"quant_config": QuantConfig(quant_type="fp4", block_size=128, storage_dtype="bfloat16")},
    ],
)
def test_asking_for_what_it_is_or_for_nothing(same: dict[str, Any], tmp_path: Path) -> None:
    folder = folder_4bit(tmp_path, QuantConfig(quant_type="fp4", block_size=128, double_quant=False))
    layer = load_model(folder, **same).model.layers[0].mlp.up_proj
    assert isinstance(layer, Linear4bit)
    assert (layer.quant_type, layer.block_size, layer.quantized.double_quant) == ("fp4", 128, False)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"quant_type": "fp4"}, "quant_type"),
        ({"block_size": 128}, "block_size"),
        ({"double_quant": False}, "double_quant"),
        ({"quant_config": QuantConfig(skip=("lm_head", "q_proj"))}, "skip"),
        ({"quant_config": QuantConfig(quant_type=None, overrides={"q_proj": {"quant_type": "nf4"}})}, "overrides"),
    ],
)
def test_asking_for_something_else(other: dict[str, Any], named: str, tmp_path: Path) -> None:
    message = refused(folder_4bit(tmp_path), ConfigError, **other)
    assert "is in 4 bits already (" in message and f"the requested {named} needs the 16-bit model" in message
    assert "quant_type nf4, block_size 64, double_quant True" in message


def test_settings_are_given_once(tmp_path: Path) -> None:
    message = refused(folder_4bit(tmp_path), ConfigError, quant_config=QuantConfig(), block_size=32)
    assert message == "give quant_config, or quant_type, block_size and double_quant, not both"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq' cannot be loaded; supported: 16-bit weights"),
        ({"quant_method": "awq"}, "quant_method 'awq' cannot be loaded"),
        ({"quant_method": ["bitsandbytes"]}, "quant_method ['bitsandbytes'] cannot be loaded"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8-bit weights of bitsandbytes cannot be loaded"),
        ({"_load_in_8bit": True}, "8-bit weights of bitsandbytes cannot be loaded"),
        ("4bit", "quantization_config is a JSON str, expected an object"),
    ],
)  # fmt: skip
def test_other_kinds_of_quantization(section: Any, message: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, small_decoder())
    change_config(tmp_path, quantization_config=section)
    assert message in refused(tmp_path, ConfigError)


def test_a_promise_of_4_bits_that_is_not_kept(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, small_decoder())
    change_config(tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert "says that the weights are in 4 bits, but none are" in refused(tmp_path)


# malformed files


def state(**changes: Any) -> torch.Tensor:
    values = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [48, 32]}
    values |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1}
    return torch.tensor(list(json.dumps(values | changes).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({UP: None}, f"tensor '{UP}' is missing"),
        ({f"{UP}.absmax": None}, f"tensor '{UP}.absmax' is missing"),
        ({f"{UP}.nested_quant_map": None}, f"tensor '{UP}.nested_quant_map' is missing"),
        ({STATE: None}, f"tensor '{STATE}' is missing, and there is none of another type"),
        ({UP: torch.zeros(767, 1, dtype=torch.uint8)}, f"tensor '{UP}' has 767 packed bytes, expected 768"),
        ({UP: torch.zeros(48, 32)}, f"tensor '{UP}' has 6144 packed bytes, expected 768"),
        ({f"{UP}.absmax": torch.zeros(24)}, f"tensor '{UP}.absmax' is float32 [24], expected uint8 [24]"),
        ({f"{UP}.nested_absmax": torch.tensor([torch.nan])}, f"tensor '{UP}.nested_absmax' holds inf or nan"),
        ({STATE: torch.zeros(4)}, f"tensor '{STATE}' has dtype float32"),
        ({STATE: torch.zeros(4, dtype=torch.uint8)}, f"tensor '{STATE}': not valid JSON"),
        ({STATE: state(shape=[2**31, 2**31])}, f"tensor '{UP}' has 768 packed bytes, expected 2305843009213693952"),
        ({STATE: state(blocksize=63)}, f"tensor '{STATE}': blocksize is 63"),
        ({f"{UP}.absmaxx": torch.zeros(1)}, f"{UP}.absmaxx is not a tensor of LlamaForCausalLM"),
        ({"model.norm.weight.absmax": torch.zeros(1)}, "tensor 'model.norm.weight.quant_state.bitsandbytes__nf4' is"),
        ({STATE: state(shape=[32, 48])}, f"{UP} has shape (32, 48), expected (48, 32)"),
    ],
)
def test_malformed_tensors_are_named(changes: dict[str, torch.Tensor | None], message: str, tmp_path: Path) -> None:
    folder = folder_4bit(tmp_path)
    tensors: dict[str, Any] = load_file(folder / "model.safetensors") | changes
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / "model.safetensors")
    found = refused(folder)
    assert message in found and str(folder) in found


def test_only_linear_layers_can_be_in_4_bits(tmp_path: Path) -> None:
    folder = folder_4bit(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    parts = {name.removeprefix(UP): tensor for name, tensor in tensors.items() if name.startswith(UP)}
    parts[STATE.removeprefix(UP)] = state(shape=[1536])
    save_file(tensors | {f"model.norm.weight{s}": t.clone() for s, t in parts.items()}, folder / "model.safetensors")
    message = refused(folder)
    assert "model.norm.weight has shape (1536,), expected (32,)" in message
    assert "model.norm.weight is in 4 bits, but only the weight of a linear layer can be" in message


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", ".."])
def test_a_shard_outside_the_folder_is_not_read(shard: str, tmp_path: Path) -> None:
    folder = folder_4bit(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "is not the name of a file in this folder" in refused(folder)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer and few tokens, so that the header is most of the file."""
    changes = {"num_hidden_layers": 1, "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "head_dim": 2}
    return folder_4bit(tmp_path_factory.mktemp("intact"), **changes)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_corruption_is_an_error_or_a_model(intact: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Whatever bytes of header or data change: a CheckpointError, or a model that computes."""
    raw = bytearray((intact / "model.safetensors").read_bytes())
    head = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, head - 1) | st.integers(0, len(raw) - 1))
        new = data.draw(st.sampled_from(list(b'0123456789[]{},:"FIBU_.\\')) | st.integers(0, 255))
        kind = data.draw(st.sampled_from(["change", "change", "insert", "delete", "cut"]))
        if kind == "change":
            raw[at] = new
        elif kind == "insert":
            raw.insert(at, new)
        elif kind == "delete":
            del raw[at]
        else:
            del raw[at:]
            break
        if not raw:
            break
    (tmp_path / "model.safetensors").write_bytes(raw)
    (tmp_path / "config.json").write_bytes((intact / "config.json").read_bytes())
    try:
        model = load_model(tmp_path)
    except CheckpointError as error:
        assert str(tmp_path) in str(error)
        return
    assert model(IDS % 16).shape == (1, 5, 16)
