"""A foreign format of quantized weights from one definition: it is recognized, checked, read, and written back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from small_models import small_config, small_decoder, write_checkpoint, write_weights
from torch import Tensor, nn

import lorakit as lk
from lorakit.checkpoints.checkpoint import Checkpoint
from lorakit.checkpoints.formats import STORED_FORMATS, StoredFormat, StoredWeight
from lorakit.checkpoints.prequantized import find_stored
from lorakit.errors import CheckpointError, ConfigError
from lorakit.quantization import QuantizedWeight, codebook
from lorakit.quantization.bnb_format import Layout
from lorakit.quantization.policy import QuantConfig, WeightFormat

# ---- the definition: all that there is to say of a format ------------------------------------------------------------


class Toy(StoredFormat):
    """NF4 in blocks of 32: <weight>.codes, the packed bytes in rows, and <weight>.scales, fp32."""

    method: ClassVar[str] = "toy"
    description: ClassVar[str] = "4-bit weights of toy"

    def declares(self, section: Mapping[str, Any]) -> bool:
        return section.get("bits") == 4

    def refusal(self, section: Mapping[str, Any]) -> str | None:
        return None if section.get("bits") == 4 else "other than 4 bits of toy cannot be loaded"

    def find(self, checkpoint: Checkpoint) -> dict[str, StoredWeight]:
        found = {}
        for codes in [name for name in checkpoint.names if name.endswith(".codes")]:
            name = codes.removesuffix(".codes")
            rows, half = checkpoint.shape(codes)
            parts = (codes, f"{name}.scales")
            if checkpoint.shape(parts[1]) != (rows * half // 16,):
                raise CheckpointError(f"{checkpoint.file(codes)}: tensor '{parts[1]}' is of a wrong size")
            form = WeightFormat("nf4", 32, double_quant=False)
            found[name] = StoredWeight(parts, (rows, 2 * half), form, partial(self._assemble, parts))
        return found

    def _assemble(self, parts: tuple[str, str], tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        codes, scales = (tensors[part] for part in parts)
        shape = torch.Size((len(codes), 2 * codes.shape[1]))
        return QuantizedWeight(codes, scales, shape, torch.float32, "nf4", 32, codebook("nf4").values)

    def tensors(self, name: str, weight: QuantizedWeight, storage_dtype: torch.dtype) -> dict[str, Tensor]:
        return {f"{name}.codes": weight.packed.view(weight.shape[0], -1), f"{name}.scales": weight.absmax}

    def layouts(self, name: str, source: Layout, form: WeightFormat, storage_dtype: torch.dtype) -> dict[str, Layout]:
        rows, columns = source[1]
        return {
            f"{name}.codes": (torch.uint8, (rows, columns // 2)),
            f"{name}.scales": (torch.float32, (rows * columns // 32,)),
        }

    def config_section(
        self,
        config: QuantConfig,
        formats: Mapping[str, WeightFormat | None],
        dense_layers: Sequence[str],
        values: Mapping[str, Any],
    ) -> dict[str, Any]:
        return {"quant_method": self.method, "bits": 4}


TOY = Toy()

# ----------------------------------------------------------------------------------------------------------------------

IDS = torch.tensor([[5, 17, 300, 2, 41]])
CONFIG = QuantConfig(block_size=32, double_quant=False)
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setitem(STORED_FORMATS, TOY.method, TOY)
        yield


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A 16-bit folder, and the same in the toy's format, written by its own methods."""
    source = write_checkpoint(tmp_path / "16bit", small_decoder())
    linear = {f"{path}.weight" for path, m in small_decoder().named_modules() if isinstance(m, nn.Linear)}
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name in linear - {"lm_head.weight"}:
            weight = lk.quantize(tensor, "nf4", block_size=32, double_quant=False)
            written = TOY.tensors(name, weight, torch.uint8)
            expected = TOY.layouts(name, (tensor.dtype, tuple(tensor.shape)), WeightFormat(), torch.uint8)
            assert {part: (t.dtype, tuple(t.shape)) for part, t in written.items()} == expected
            tensors |= written
        else:
            tensors[name] = tensor
    target = write_checkpoint(tmp_path / "toy", small_decoder())
    write_weights(target, {name: tensor.contiguous() for name, tensor in tensors.items()})
    declare(target, TOY.config_section(CONFIG, {}, [], {}))
    return source, target


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


def test_an_adapter_is_inspected_on_it(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model = lk.load_model(folders[1])
    lk.add_adapter(model, lk.LoraConfig(r=2, init_lora_weights=False))
    info = lk.inspect_adapter(lk.save_adapter(model, tmp_path / "adapter"), base=folders[1])
    layer = next(layer for layer in info.layers if f"{layer.name}.weight" == UP)
    weight = lk.load_model(folders[1], quant_type=None, dtype=torch.float32).get_parameter(UP)
    assert layer.base is not None
    assert layer.base.base_norm == pytest.approx(float(weight.double().norm()), rel=1e-6)


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
    monkeypatch.delitem(STORED_FORMATS, TOY.method)
    with pytest.raises(ConfigError, match="quant_method 'toy' cannot be loaded"):
        lk.load_model(folders[1])
