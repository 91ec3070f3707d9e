"""Reading checkpoint folders whose weights are already quantized, in any of the `STORED_FORMATS`.

The tensors themselves say which weights are quantized. config.json only says whether the folder's format can be read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..quantization import QuantizedWeight
from ..quantization.policy import QuantConfig
from .checkpoint import Checkpoint
from .formats import STORED_FORMATS, StoredFormat, StoredWeight
from .stream import stream_tensors


def declared_format(values: Mapping[str, Any]) -> StoredFormat | None:
    """Return the format that a config.json says its weights are quantized in, None for 16-bit weights.

    Raises:
        ConfigError: it names a format that cannot be read.
    """
    section = values.get("quantization_config")
    if section is None:
        return None
    if not isinstance(section, dict):
        raise ConfigError(f"config.json: quantization_config is a JSON {type(section).__name__}, expected an object")
    default = next((form.method for form in STORED_FORMATS.values() if form.method_is_optional), None)
    method = section.get("quant_method", default)
    form = STORED_FORMATS.get(method) if isinstance(method, str) else None
    refusal = f"quant_method {method!r} cannot be loaded" if form is None else form.refusal(section)
    if form is None or refusal:
        supported = ", or ".join(["16-bit weights", *(known.description for known in STORED_FORMATS.values())])
        raise ConfigError(f"config.json: {refusal}; supported: {supported}")
    return form if form.declares(section) else None


def find_stored(checkpoint: Checkpoint) -> dict[str, StoredWeight]:
    """Return a checkpoint's quantized weights, name -> stored weight, checked as far as headers allow.

    Raises:
        CheckpointError: naming file and tensor: one is missing, malformed, or has a wrong dtype or size; or
            config.json promises 4-bit weights, and there are none.
        ConfigError: config.json names a format that cannot be read.
    """
    declared = declared_format(checkpoint.config())
    weights: dict[str, StoredWeight] = {}
    for form in [declared] if declared else STORED_FORMATS.values():
        weights |= form.find(checkpoint)
    if declared and not weights:
        raise CheckpointError(f"{checkpoint.folder}: config.json says that the weights are in 4 bits, but none are")
    return weights


def check_request(requested: QuantConfig, stored: Mapping[str, StoredWeight], folder: object) -> None:
    """Raise ConfigError if a requested setting differs from a 4-bit folder's. Default values request nothing."""
    asked = {
        key: value
        for key, field in QuantConfig.model_fields.items()
        if key != "storage_dtype" and (value := getattr(requested, key)) != field.get_default(call_default_factory=True)
    }
    if asked.get("quant_type", "") is None:
        asked = {key: asked[key] for key in ("skip", "overrides") if key in asked}
    for name, weight in stored.items():
        form = weight.format
        if different := [key for key, value in asked.items() if value != getattr(form, key, None)]:
            has = ", ".join(f"{key} {getattr(form, key)}" for key in ("quant_type", "block_size", "double_quant"))
            raise ConfigError(
                f"{folder} is in 4 bits already ({name}: {has}) and is loaded as it is; the requested {different[0]} "
                f"needs the 16-bit model, or quant_type=None, which dequantizes"
            )


def stream_stored(
    checkpoint: Checkpoint,
    names: Iterable[str],
    stored: Mapping[str, StoredWeight],
    dtype: torch.dtype,
    device: str | torch.device,
    dequantize: bool = False,
) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    """Yield the named tensors, of any shape: 4-bit weights assembled from their parts, all others in `dtype`.

    Args:
        dequantize: yield the 4-bit weights in `dtype` too.

    Raises:
        CheckpointError: as `stream_tensors`, or a scale is inf or nan.
    """
    owners = {part: name for name in names for part in (stored[name].parts if name in stored else (name,))}
    incomplete: dict[str, dict[str, Tensor]] = {}
    for part, tensor in stream_tensors(checkpoint, dict.fromkeys(owners), device=device):
        assert isinstance(tensor, Tensor)  # no format was given
        name = owners[part]
        if name not in stored:
            yield name, tensor.to(dtype)
            continue
        tensors = incomplete.setdefault(name, {})
        tensors[part] = tensor
        if len(tensors) == len(stored[name].parts):
            try:
                weight = stored[name].assemble(incomplete.pop(name))
            except CheckpointError as error:
                raise CheckpointError(f"{checkpoint.file(stored[name].parts[0])}: {error}") from None
            yield name, weight.dequantize(dtype) if dequantize else weight
