"""4-bit weights of bitsandbytes, as transformers saves them. `quantization.bnb_format` describes the tensors.

Each weight is read by its own state, not by config.json: a folder may mix types and block sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError
from ...quantization import QuantizedWeight, bnb_format
from ...quantization.bnb_format import Layout
from ...quantization.policy import QuantConfig, WeightFormat
from ...quantization.scales import NESTED_BLOCK_SIZE
from ..checkpoint import Checkpoint
from .stored_format import StoredFormat, StoredWeight

_LONGEST_OFFSET = -1.2345678901234567e-38  # no double takes more characters in JSON


class BitsAndBytes(StoredFormat):
    """NF4 and FP4 weights, with or without double quantization; 8-bit weights are refused."""

    method: ClassVar[str] = "bitsandbytes"
    description: ClassVar[str] = "4-bit weights of bitsandbytes (nf4, fp4)"
    method_is_optional: ClassVar[bool] = True  # transformers before 4.36 wrote none

    def declares(self, section: Mapping[str, Any]) -> bool:
        return bool(section.get("load_in_4bit") or section.get("_load_in_4bit"))

    def refusal(self, section: Mapping[str, Any]) -> str | None:
        is_8bit = section.get("load_in_8bit") or section.get("_load_in_8bit")
        return "8-bit weights of bitsandbytes cannot be loaded" if is_8bit else None

    def find(self, checkpoint: Checkpoint) -> dict[str, StoredWeight]:
        weights = {}
        for name, state_suffixes in bnb_format.group_parts(checkpoint.names).items():
            suffixes = ("", *state_suffixes) if name in checkpoint else tuple(state_suffixes)
            parts = {suffix: bnb_format.joined(name, suffix) for suffix in suffixes}
            try:
                key = bnb_format.state_suffix(name, suffixes)
                bnb_format.check_state_layout(parts[key], checkpoint.dtype(parts[key]), checkpoint.shape(parts[key]))
                state = bnb_format.read_state(name, key, checkpoint.read(parts[key]))
                state.check(name, {s: (checkpoint.dtype(part), checkpoint.shape(part)) for s, part in parts.items()})
            except CheckpointError as error:
                raise CheckpointError(f"{checkpoint.file(min(parts.values()))}: {error}") from None
            form = WeightFormat(state.quant_type, state.block_size, state.nested_block_size is not None)
            assemble = partial(_assemble, name, parts)
            weights[name] = StoredWeight(tuple(parts.values()), tuple(state.shape), form, assemble)
        return weights

    def tensors(self, name: str, weight: QuantizedWeight, storage_dtype: torch.dtype) -> dict[str, Tensor]:
        parts = bnb_format.to_tensors(weight, storage_dtype)
        return {bnb_format.joined(name, suffix): part for suffix, part in parts.items()}

    def layouts(self, name: str, source: Layout, form: WeightFormat, storage_dtype: torch.dtype) -> dict[str, Layout]:
        dtype, shape = source
        if -(-math.prod(shape) // 2) % storage_dtype.itemsize:
            plain = str(storage_dtype).removeprefix("torch.")
            raise ConfigError(
                f"{name}: the packed bytes of shape {list(shape)} do not divide into elements of {plain}; use "
                f"storage_dtype uint8"
            )
        nested = (NESTED_BLOCK_SIZE, _LONGEST_OFFSET) if form.double_quant else (None, None)
        state = bnb_format.QuantState(form.quant_type, form.block_size, dtype, torch.Size(shape), *nested)
        return {bnb_format.joined(name, suffix): layout for suffix, layout in state.layouts(storage_dtype).items()}

    def config_section(
        self,
        config: QuantConfig,
        formats: Mapping[str, WeightFormat | None],
        dense_layers: Sequence[str],
        values: Mapping[str, Any],
    ) -> dict[str, Any]:
        first_format = next(form for form in formats.values() if form is not None)
        return {
            "quant_method": self.method,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": config.quant_type or first_format.quant_type,
            "bnb_4bit_use_double_quant": config.double_quant,
            "bnb_4bit_quant_storage": config.storage_dtype,
            "bnb_4bit_compute_dtype": values.get("dtype") or values.get("torch_dtype") or "bfloat16",
            "llm_int8_skip_modules": list(dense_layers),
        }


def _assemble(name: str, parts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    return bnb_format.from_tensors(name, {suffix: tensors[part] for suffix, part in parts.items()})


BITSANDBYTES = BitsAndBytes()
