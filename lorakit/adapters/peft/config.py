"""PEFT's adapter_config.json: read into a `LoraConfig`, written with the keys that its readers look for.

A setting that the file lacks has the default of `LoraConfig`, which is PEFT's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import AdapterError, CheckpointError, ConfigError
from ...files import read_json_object
from ...layers import VARIANTS, LoRALinear, Variant, variants_read
from ..attach.add import adapter_configs, lora_layers
from ..attach.targeting import last_name
from ..config import LoraConfig
from ..starts import changed_base_in_peft
from .fingerprint import base_names
from .names import CONFIG_FILE

# Keys of PEFT's config that change the result and that we do not have: they must hold a neutral value.
_UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config", "use_bdlora",
    "use_qalora", "velora_config",
)  # fmt: skip


def read_adapter_config(path: str | os.PathLike[str]) -> LoraConfig:
    """Read the adapter_config.json of a PEFT folder.

    Raises:
        CheckpointError: it is missing or not JSON.
        AdapterError: it is not a LoRA adapter, or needs a feature we do not have.
    """
    file = Path(path) / CONFIG_FILE
    return attachable_config(read_config_file(file), file)


def attachable_config(values: Mapping[str, Any], file: Path) -> LoraConfig:
    """Return the settings with which the adapter of a file's config is attached; everything in them is checked.

    Raises:
        AdapterError: a setting is not valid, or needs a feature we do not have.
    """
    values = file_variant(values, file).from_file(dict(values))
    used = [key for key in _UNSUPPORTED if values.get(key)]
    if used:
        raise AdapterError(f"{file} needs {', '.join(used)}, which this version does not support")
    init = values.get("init_lora_weights")
    if changed_base_in_peft(init):
        raise AdapterError(
            f"{file} has init_lora_weights '{init}', which changed the base model; convert the adapter to plain "
            "LoRA with PEFT first (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    known = {key: values[key] for key in LoraConfig.model_fields if key in values and key != "init_lora_weights"}
    known = {key: value for key, value in known.items() if value is not None}
    known.setdefault("target_modules", [])
    known.setdefault("ensure_weight_tying", False)  # as PEFT reads a config without it
    try:
        return LoraConfig(**known)
    except ConfigError as error:
        raise AdapterError(f"{file}: {error}") from None


def matrix_config(values: Mapping[str, Any], file: Path) -> LoraConfig:
    """Return what a file's config says of its matrices alone: ranks, alphas and rsLoRA; the rest may be of any kind.

    So an adapter that cannot be attached here can still be inspected, exported and compared.

    Raises:
        CheckpointError: one of these settings is not valid.
    """
    values = file_variant(values, file).from_file(dict(values))
    said: dict[str, Any] = {key: values[key] for key in ("r", "lora_alpha") if key in values}
    patterns: dict[str, dict[str, Any]] = {key: values.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    numbers = dict(said)
    for key, pattern in patterns.items():
        if not isinstance(pattern, dict):
            raise CheckpointError(f"{file}: {key} is {pattern!r}, expected an object")
        numbers |= {f"{key}.{module}": value for module, value in pattern.items()}
    for key, value in numbers.items():
        is_rank = key == "r" or key.startswith("rank_pattern")
        if type(value) not in ((int,) if is_rank else (int, float)) or not 0 < value < 1e9:
            expected = "a whole number from 1" if is_rank else "a number above 0"
            raise CheckpointError(f"{file}: {key} is {value!r}, expected {expected}")
    return LoraConfig(**said, **patterns, use_rslora=bool(values.get("use_rslora")))


def read_config_file(file: Path) -> dict[str, Any]:
    """Return the contents of an adapter_config.json as they stand.

    Raises:
        CheckpointError: it is missing or not a JSON object.
        AdapterError: it is not a LoRA adapter.
    """
    values = read_json_object(file)
    if values.get("peft_type") not in {variant.peft_type for variant in VARIANTS.values()}:
        raise AdapterError(f"{file}: expected an object with peft_type 'LORA', got {values.get('peft_type')!r}")
    return values


def file_variant(values: Mapping[str, Any], file: Path) -> Variant:
    """Return the variant of the adapter whose settings a file holds.

    Raises:
        AdapterError: it names none that is known here, or several.
    """
    found = variants_read(values)
    if len(found) > 1:
        raise AdapterError(f"{file}: {' and '.join(variant.setting for variant in found)} exclude each other")
    if not found:
        raise AdapterError(f"{file}: its variant {values.get('variant')!r} is not known here")
    return found[0]


def peft_config(model: nn.Module, name: str) -> dict[str, Any]:
    """Return the contents of adapter_config.json for an adapter of a model."""
    config = adapter_configs(model)[name]
    values = config.model_dump(mode="json")
    targets = values["target_modules"]
    is_word = isinstance(targets, str) and targets.lower() == "all-linear"  # which not every reader knows
    is_narrowed = isinstance(targets, str) and values["layers_to_transform"] is not None  # which PEFT refuses
    if is_word or is_narrowed:
        values["target_modules"] = _target_names(model, name)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    layers = lora_layers(model, name).values()
    values |= {
        "peft_type": config.update_variant.peft_type,
        "task_type": None if head is None else "CAUSAL_LM",
        "base_model_name_or_path": next(base_names(model), None),
        "fan_in_fan_out": any(isinstance(layer, LoRALinear) and layer.is_conv1d for layer in layers),
        "inference_mode": True,
        "init_lora_weights": True,
        "ensure_weight_tying": bool(config.ensure_weight_tying),
    }
    values = config.update_variant.to_file(values)
    whole = {"lora_alpha": _whole(values["lora_alpha"])} if "lora_alpha" in values else {}
    patterns = {key: _whole(alpha) for key, alpha in values.get("alpha_pattern", {}).items()}
    return values | whole | ({"alpha_pattern": patterns} if "alpha_pattern" in values else {})


def _target_names(model: nn.Module, name: str) -> list[str]:
    """Return the last names of the adapted layers, or full paths where a last name would match other layers too."""
    adapted = set(lora_layers(model, name))
    names = {last_name(path) for path in adapted}
    others = [path for path, _ in model.named_modules() if path not in adapted]  # a container's name counts in PEFT
    extra = [path for path in others if last_name(path) in names]
    return sorted(adapted if extra else names)


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value
