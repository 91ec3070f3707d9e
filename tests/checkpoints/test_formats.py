"""A foreign format of quantized weights: how it is recognized and checked, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from made import small_config, small_decoder, write_checkpoint, write_weights
from safetensors.torch import load_file
from toy_stored_format import ROWS, write_stored

import lorakit as lk
from lorakit.checkpoints.checkpoint import Checkpoint
from lorakit.checkpoints.formats import STORED_FORMATS
from lorakit.checkpoints.prequantized import find_stored
from lorakit.errors import CheckpointError, ConfigError
from lorakit.quantization.policy import QuantConfig

IDS = torch.tensor([[5, 17, 300, 2, 41]])
CONFIG = QuantConfig(block_size=32, double_quant=False)
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setitem(STORED_FORMATS, ROWS.method, ROWS)
        yield


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A 16-bit folder, and the same in the toy's format."""
    source = write_checkpoint(tmp_path / "16bit", small_decoder())
    return source, write_stored(tmp_path / "toy", source)


def declare(folder: Path, section: Mapping[str, Any] | None) -> None:
    config = small_config() if section is None else small_config(quantization_config=section)
    (folder / "config.json").write_text(json.dumps(config))


def test_it_is_loaded_as_it_is(folders: tuple[Path, Path]) -> None:
    source, folder = folders
    model = lk.load_model(folder, dtype=torch.float32)
    assert isinstance(model.model.layers[0].get_submodule("mlp.up_proj"), lk.Linear4bit)
    assert torch.equal(model(IDS), lk.load_model(source, dtype=torch.float32, quant_config=CONFIG)(IDS))
    declare(folder, None)  # the tensors themselves tell
    assert torch.equal(lk.load_model(folder, dtype=torch.float32)(IDS), model(IDS))


def test_it_is_dequantized(folders: tuple[Path, Path]) -> None:
    dense = lk.load_model(folders[1], quant_type=None, dtype=torch.float32)
    packed = lk.load_model(folders[1], dtype=torch.float32)
    expected: Any = packed.get_submodule(UP.removesuffix(".weight"))
    assert torch.equal(dense.get_parameter(UP), expected.dense_weight(torch.float32))


def test_other_settings_and_other_kinds_are_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="the requested block_size needs the 16-bit model"):
        lk.load_model(folders[1], block_size=128)
    declare(folders[1], {"quant_method": "toy", "bits": 3})
    both = "supported: 16-bit weights, or 4-bit weights of bitsandbytes .*, or 4-bit weights of toy"
    with pytest.raises(ConfigError, match=f"other than 4 bits of toy cannot be loaded; {both}"):
        lk.load_model(folders[1])


def test_what_is_promised_or_written_wrong_is_named(folders: tuple[Path, Path]) -> None:
    source, folder = folders
    declare(source, {"quant_method": "toy", "bits": 4})
    with pytest.raises(CheckpointError, match="says that the weights are in 4 bits, but none are"):
        lk.load_model(source)
    tensors = load_file(folder / "model.safetensors")
    write_weights(folder, tensors | {f"{UP}.scales": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=f"tensor '{UP}.scales' is of a wrong size"):
        find_stored(Checkpoint(folder))


def test_without_its_entry_it_is_refused(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(STORED_FORMATS, ROWS.method)
    with pytest.raises(ConfigError, match="quant_method 'toy' cannot be loaded"):
        lk.load_model(folders[1])
