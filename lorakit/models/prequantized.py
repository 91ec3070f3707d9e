"""Reading checkpoint folders that are 4-bit already, as transformers saves them with bitsandbytes.

Which weights are in 4 bits is read from the tensors themselves; config.json is asked only whether the folder is of a
kind that can be read at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..quantization import QuantizedWeight, bnb_format
from ..quantization.policy import QuantConfig, WeightFormat
from .checkpoint import Checkpoint
from .stream import stream_tensors

_SUPPORTED = "16-bit weights, or 4-bit weights of bitsandbytes (nf4, fp4)"


@dataclass(frozen=True)
class StoredWeight:
    """A 4-bit weight of a checkpoint, whose tensors were checked against each other but not read.

    Attributes:
        state: type, block size, original shape and dtype.
        suffixes: of its tensors' names, "" for the packed bytes.
    """

    state: bnb_format.QuantState
    suffixes: tuple[str, ...]

    @property
    def format(self) -> WeightFormat:
        """How the weight is quantized."""
        return WeightFormat(self.state.quant_type, self.state.block_size, self.state.nested_block_size is not None)


def declared_4bit(values: Mapping[str, Any]) -> bool:
    """Whether a config.json says that its weights are in bitsandbytes' 4 bits.

    Raises:
        ConfigError: it says that they are quantized in another way.
    """
    section = values.get("quantization_config")
    if section is None:
        return False
    if not isinstance(section, dict):
        raise ConfigError(f"config.json: quantization_config is a JSON {type(section).__name__}, expected an object")
    method = section.get("quant_method", "bitsandbytes")  # transformers before 4.36 wrote no method for bitsandbytes
    if method != "bitsandbytes":
        raise ConfigError(f"config.json: quant_method {method!r} cannot be loaded; supported: {_SUPPORTED}")
    if section.get("load_in_8bit") or section.get("_load_in_8bit"):
        raise ConfigError(f"config.json: 8-bit weights of bitsandbytes cannot be loaded; supported: {_SUPPORTED}")
    return bool(section.get("load_in_4bit") or section.get("_load_in_4bit"))


def find_stored(checkpoint: Checkpoint) -> dict[str, StoredWeight]:
    """Find a checkpoint's 4-bit weights, name -> what is stored, and check them as far as headers allow.

    Raises:
        CheckpointError: naming file and tensor: one is missing or of a wrong dtype or size, or a state is malformed; or
            config.json promises 4-bit weights, and there are none.
        ConfigError: config.json says that the weights are quantized in a way that cannot be read.
    """
    declared = declared_4bit(checkpoint.config())
    found: dict[str, StoredWeight] = {}
    for name, others in bnb_format.group_parts(checkpoint.names).items():
        suffixes = ("", *others) if name in checkpoint else tuple(others)
        try:
            key = bnb_format.state_suffix(name, suffixes)
            full = bnb_format.joined(name, key)
            bnb_format.check_state_layout(full, checkpoint.dtype(full), checkpoint.shape(full))
            state = bnb_format.read_state(name, key, checkpoint.read(full))
            parts = {suffix: bnb_format.joined(name, suffix) for suffix in suffixes}
            state.check(name, {s: (checkpoint.dtype(part), checkpoint.shape(part)) for s, part in parts.items()})
        except CheckpointError as error:
            raise _in_file(checkpoint, name, suffixes, error) from None
        found[name] = StoredWeight(state, suffixes)
    if declared and not found:
        raise CheckpointError(f"{checkpoint.folder}: config.json says that the weights are in 4 bits, but none is")
    return found


def check_request(requested: QuantConfig, stored: Mapping[str, StoredWeight], folder: object) -> None:
    """Raise ConfigError if other settings are asked for than a 4-bit folder has; the defaults ask for nothing."""
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
                f"{folder} is in 4 bits already ({name}: {has}) and is loaded as it is; the {different[0]} asked for "
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
    """Yield the named tensors, 4-bit weights put together from their parts, all others in `dtype`.

    Args:
        dequantize: yield the 4-bit weights in `dtype` too.

    Raises:
        CheckpointError: as `stream_tensors`, or a scale is inf or nan.
    """
    parts: dict[str, tuple[str, str]] = {}  # name in the file -> (name in the model, suffix)
    for name in names:
        for suffix in stored[name].suffixes if name in stored else ("",):
            parts[bnb_format.joined(name, suffix)] = name, suffix
    incomplete: dict[str, dict[str, Tensor]] = {}
    for part, tensor in stream_tensors(checkpoint, dict.fromkeys(parts), device=device):
        assert isinstance(tensor, Tensor)  # no format was given
        name, suffix = parts[part]
        if name not in stored:
            yield name, tensor.to(dtype)
            continue
        tensors = incomplete.setdefault(name, {})
        tensors[suffix] = tensor
        if len(tensors) == len(stored[name].suffixes):
            try:
                weight = bnb_format.from_tensors(name, incomplete.pop(name))
            except CheckpointError as error:
                raise _in_file(checkpoint, name, tensors, error) from None
            yield name, weight.dequantize(dtype) if dequantize else weight


def _in_file(checkpoint: Checkpoint, name: str, suffixes: Iterable[str], error: CheckpointError) -> CheckpointError:
    file = checkpoint.file(bnb_format.joined(name, min(suffixes)))  # the packed bytes' file, where they are there
    return CheckpointError(f"{file}: {error}")
