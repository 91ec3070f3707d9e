"""A foreign format of stored weights: packed NF4 codes in rows, and one fp32 scale for each block of 32."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from made import small_config, small_decoder, write_checkpoint, write_weights
from safetensors.torch import load_file
from torch import Tensor, nn

import lorakit as lk
from lorakit.checkpoints.checkpoint import Checkpoint
from lorakit.checkpoints.formats import StoredFormat, StoredWeight
from lorakit.errors import CheckpointError
from lorakit.quantization import QuantizedWeight, codebook
from lorakit.quantization.bnb_format import Layout
from lorakit.quantization.policy import QuantConfig, WeightFormat


class Rows(StoredFormat):
    """<weight>.codes are the packed bytes in rows, and <weight>.scales are fp32."""

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


ROWS = Rows()


def write_stored(folder: Path, source: Path) -> Path:
    """Write the small model of a 16-bit folder in this format, by the format's own methods; return the folder."""
    linear = {f"{path}.weight" for path, m in small_decoder().named_modules() if isinstance(m, nn.Linear)}
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name in linear - {"lm_head.weight"}:
            weight = lk.quantize(tensor, "nf4", block_size=32, double_quant=False)
            written = ROWS.tensors(name, weight, torch.uint8)
            expected = ROWS.layouts(name, (tensor.dtype, tuple(tensor.shape)), WeightFormat(), torch.uint8)
            assert {part: (t.dtype, tuple(t.shape)) for part, t in written.items()} == expected
            tensors |= written
        else:
            tensors[name] = tensor
    write_checkpoint(folder, small_decoder())
    write_weights(folder, {name: tensor.contiguous() for name, tensor in tensors.items()})
    section = ROWS.config_section(QuantConfig(block_size=32, double_quant=False), {}, [], {})
    (folder / "config.json").write_text(json.dumps(small_config(quantization_config=section)), encoding="utf-8")
    return folder
