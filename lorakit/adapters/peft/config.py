"""PEFT's adapter_config.json: reading it into a `LoraConfig`, and writing it with the keys that other readers expect.

A setting that the file lacks has the default of `LoraConfig`, which is also PEFT's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from torch import nn

from ...errors import AdapterError, CheckpointError, ConfigError
from ...files import read_json_object
from ...layers import VARIANTS, LoRALinear, SavedModule, TiedModule, TrainedTokens, Variant, variants_read
from ..attach.state import adapter_configs, adapter_modules, lora_layers
from ..attach.targeting import last_name, match_names
from ..attach.ties import input_embedding, plain_path
from ..attach.wrappers import named_modules
from ..config import LoraConfig, Task, loosely_saved
from ..starts import changed_base_in_peft
from .fingerprint import base_names
from .names import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE
from .task_type import task_type

# Keys of PEFT's config that change the result and that lorakit does not have: they must hold a neutral value.
_UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config", "use_bdlora",
    "use_qalora", "velora_config",
)  # fmt: skip


def find_adapter_folder(path: str | os.PathLike[str]) -> Path:
    """Return the folder of the adapter at `path`: `path` itself, or the one folder in it that holds an adapter.

    Raises:
        AdapterError: there is no adapter, or there are several.
    """
    path = Path(path).expanduser()
    if any((path / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE)):
        return path
    if not path.is_dir():
        raise AdapterError(f"{path} is not a folder; expected one that holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    visible = [folder for folder in path.iterdir() if not folder.name.startswith(".")]  # not left by a killed process
    folders = sorted(folder for folder in visible if (folder / CONFIG_FILE).is_file())
    if len(folders) == 1:
        return folders[0]
    if folders:
        names = ", ".join(folder.name for folder in folders)
        raise AdapterError(f"{path} holds several adapters ({names}); name one of these folders")
    raise AdapterError(f"{path} holds no adapter: neither it nor a folder in it has an {CONFIG_FILE}")


def read_adapter_config(path: str | os.PathLike[str]) -> LoraConfig:
    """Read the adapter_config.json of a PEFT folder, or of a run's folder.

    Raises:
        CheckpointError: it is missing or not JSON.
        AdapterError: it is not a LoRA adapter, or needs a feature that lorakit does not have.
    """
    folder = Path(path).expanduser()
    file = (find_adapter_folder(folder) if folder.is_dir() else folder) / CONFIG_FILE
    return attachable_config(read_config_file(file), file)


def attachable_config(values: Mapping[str, Any], file: Path) -> LoraConfig:
    """Return the settings for attaching the adapter of a config file, all of them checked.

    Raises:
        AdapterError: a setting is not valid, or needs a feature that lorakit does not have.
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
    known["task_type"] = values.get("task_type") if values.get("task_type") in get_args(Task) else None
    known.setdefault("ensure_weight_tying", False)  # as PEFT reads a config without it
    try:
        return LoraConfig(**known)
    except ConfigError as error:
        raise AdapterError(f"{file}: {error}") from None


def matrix_config(values: Mapping[str, Any], file: Path) -> LoraConfig:
    """Return the settings of a file's matrices: ranks, alphas and rsLoRA. The other settings are not checked.

    So an adapter that cannot be attached here can still be inspected, exported and compared.

    Raises:
        CheckpointError: one of these settings is not valid.
    """
    values = file_variant(values, file).from_file(dict(values))
    scalars: dict[str, Any] = {key: values[key] for key in ("r", "lora_alpha") if key in values}
    patterns: dict[str, dict[str, Any]] = {key: values.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    numbers = dict(scalars)
    for key, pattern in patterns.items():
        if not isinstance(pattern, dict):
            raise CheckpointError(f"{file}: {key} is {pattern!r}, expected an object")
        numbers |= {f"{key}.{module}": value for module, value in pattern.items()}
    for key, value in numbers.items():
        is_rank = key == "r" or key.startswith("rank_pattern")
        if type(value) not in ((int,) if is_rank else (int, float)) or not 0 < value < 1e9:
            expected = "a whole number from 1" if is_rank else "a number above 0"
            raise CheckpointError(f"{file}: {key} is {value!r}, expected {expected}")
    return LoraConfig(**scalars, **patterns, use_rslora=bool(values.get("use_rslora")))


def read_config_file(file: Path) -> dict[str, Any]:
    """Return the unchanged contents of an adapter_config.json.

    Raises:
        CheckpointError: it is missing or not a JSON object.
        AdapterError: it is not a LoRA adapter.
    """
    values = read_json_object(file)
    if values.get("peft_type") not in {variant.peft_type for variant in VARIANTS.values()}:
        raise AdapterError(f"{file}: expected an object with peft_type 'LORA', got {values.get('peft_type')!r}")
    return values


def file_variant(values: Mapping[str, Any], file: Path) -> Variant:
    """Return the variant that a file's settings name.

    Raises:
        AdapterError: they name an unknown variant, or several.
    """
    variants = variants_read(values)
    if len(variants) > 1:
        raise AdapterError(f"{file}: {' and '.join(variant.setting for variant in variants)} exclude each other")
    if not variants:
        raise AdapterError(f"{file}: its variant {values.get('variant')!r} is not known here")
    return variants[0]


def peft_config(model: nn.Module, name: str) -> dict[str, Any]:
    """Return the contents of adapter_config.json for an adapter of a model."""
    config = adapter_configs(model)[name]
    values = config.peft_values()
    targets = values["target_modules"]
    is_word = isinstance(targets, str) and targets.lower() == "all-linear"  # not every reader knows the word
    is_narrowed = isinstance(targets, str) and values["layers_to_transform"] is not None  # PEFT refuses both together
    if is_word or is_narrowed:
        values["target_modules"] = _target_names(model, name)
    saved = [
        path
        for path, module in adapter_modules(model, name).items()
        if isinstance(module, SavedModule) and module.parameters_of(name).keys() == module.shapes().keys()
    ]
    if loosely_saved(config.modules_to_save or (), {path for path, _ in named_modules(model)} - set(saved)):
        values["modules_to_save"] = [
            path for paths in match_names(config.modules_to_save or (), saved).values() for path in paths
        ]
    layers = lora_layers(model, name).values()
    values |= {
        "peft_type": config.update_variant.peft_type,
        "task_type": task_type(model, saved) if config.task_type == "auto" else config.task_type,
        "base_model_name_or_path": next(base_names(model), None),
        "fan_in_fan_out": any(isinstance(layer, LoRALinear) and layer.is_conv1d for layer in layers),
        "inference_mode": True,
        "init_lora_weights": True,
        **_trained_in_place_of_others(model, name, config),
    }
    values = config.update_variant.to_file(values)
    if "lora_alpha" in values:
        values = values | {"lora_alpha": _as_int(values["lora_alpha"])}
    if "alpha_pattern" in values:
        values = values | {"alpha_pattern": {key: _as_int(alpha) for key, alpha in values["alpha_pattern"].items()}}
    return values


def _target_names(model: nn.Module, name: str) -> list[str]:
    """Return the last names of the adapted layers, or all full paths if a last name would match another module too."""
    adapted = set(lora_layers(model, name))
    names = {last_name(path) for path in adapted}
    others = [path for path, _ in named_modules(model) if path not in adapted]  # PEFT matches containers too
    is_ambiguous = any(last_name(path) in names for path in others)
    return sorted(adapted if is_ambiguous else names)


def _trained_in_place_of_others(model: nn.Module, name: str, config: LoraConfig) -> dict[str, Any]:
    """Return the settings of modules that share a weight, with the name of the one that is trained for all, as in PEFT.

    Without `ensure_weight_tying`, PEFT ties rows to those of the input embedding only.
    """
    modules = [(plain_path(model, path), module) for path, module in adapter_modules(model, name).items()]
    rows = {path: module for path, module in modules if isinstance(module, TrainedTokens)}
    followed = {id(one) for _, m in modules if isinstance(m, TiedModule) for one, _ in m.sources(name).values()}
    main = input_embedding(model)
    is_tied = any(id(module) in followed and main not in (None, module.base_layer) for module in rows.values())
    values: dict[str, Any] = {"ensure_weight_tying": bool(config.ensure_weight_tying) or is_tied}
    if isinstance(named := config.trainable_token_indices, dict) and _found(named, dict(modules)) != set(rows):
        values["trainable_token_indices"] = {path: module.tokens[name] for path, module in rows.items()}
    if config.ensure_weight_tying and config.modules_to_save:
        values["modules_to_save"] = [path for path, module in modules if isinstance(module, SavedModule)]
    return values


def _found(names: Mapping[str, Any], paths: Mapping[str, Any]) -> set[str]:
    return {path for found in match_names(names, paths).values() for path in found}


def _as_int(value: float) -> float:
    """Return a whole number as an int, as PEFT writes it."""
    return int(value) if value == int(value) else value
