"""PEFT's adapter folder: adapter_config.json and adapter_model.safetensors, written and read, strictly.

    base_model.model.<module path>.lora_A.weight    (r, in_features)
    base_model.model.<module path>.lora_B.weight    (out_features, r)

The adapter's name is not in the file. Reading raises on every missing, unexpected or mis-shaped tensor, where PEFT is
silent, and leaves the model as it was.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import AdapterError, CheckpointError, ConfigError
from ..files import atomic_folder
from .attach import adapter_configs, add_adapter, check_adapter, lora_layers
from .config import LoraConfig
from .targeting import MatchReport, linear_layers, match_modules, pattern_value

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Keys of PEFT's config that change the result and that we do not have: they must hold a neutral value.
_UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "fan_in_fan_out", "kasa_config", "layer_replication", "layers_pattern",
    "lora_bias", "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora",
    "use_dora",
)  # fmt: skip
# Starts that take the adapter's first value out of the base: their files fit a base that nobody has any more.
_BASE_CHANGING_INITS = ("corda", "loftq", "olora", "pissa")


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    target: Literal["peft"] = "peft",
    dtype: torch.dtype | None = None,
) -> Path:
    """Write one adapter as a folder that PEFT loads; whole, or not at all.

    Args:
        path: the folder; an adapter that stands there is replaced.
        target: the consumer to write for; "peft".
        dtype: of the written tensors; None keeps that of the adapter.

    Returns:
        The folder.

    Raises:
        AdapterError: no adapter of that name, an unknown target, or the folder holds something that is not an adapter.
        StorageError: writing failed; what stood there is untouched.
    """
    check_adapter(model, name)
    if target != "peft":
        raise AdapterError(f"unknown target '{target}' (known: peft)")
    folder = Path(path)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG_FILE).is_file()):
        raise AdapterError(f"{folder} exists and is not an adapter folder; choose another path")
    tensors: dict[str, Tensor] = {}
    for module_path, layer in lora_layers(model, name).items():
        for key, matrix in (("lora_A", layer.lora_A[name]), ("lora_B", layer.lora_B[name])):
            tensors[f"{_PREFIX}{module_path}.{key}.weight"] = matrix.detach().to("cpu", dtype).contiguous()
    with atomic_folder(folder) as part:
        save_file(tensors, part / WEIGHTS_FILE, metadata={"format": "pt"})
        # Sorted as PEFT does, but not within rank_pattern and alpha_pattern: there the first match wins.
        text = json.dumps(dict(sorted(_peft_config(model, name).items())), indent=2)
        (part / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    return folder


def load_adapter(model: nn.Module, path: str | os.PathLike[str], name: str = "default") -> MatchReport:
    """Attach an adapter from a PEFT folder and make it active, as `add_adapter` does.

    Raises:
        AdapterError: the name is taken, a target matches nothing, or the adapter needs a feature we do not have.
        CheckpointError: a file is missing or broken, or a tensor is missing, unexpected, mis-shaped or not finite;
            every such tensor is named. The model is unchanged.
    """
    folder = Path(path)
    config = read_adapter_config(folder)
    if name in adapter_configs(model):
        raise AdapterError(f"the model already has an adapter '{name}'; remove it first or choose another name")
    tensors = _read_tensors(folder / WEIGHTS_FILE)
    _check_tensors(folder / WEIGHTS_FILE, tensors, _expected_shapes(model, config))
    report = add_adapter(model, config, name)
    with torch.no_grad():
        for module_path, layer in lora_layers(model, name).items():
            layer.lora_A[name].copy_(tensors[f"{_PREFIX}{module_path}.lora_A.weight"])
            layer.lora_B[name].copy_(tensors[f"{_PREFIX}{module_path}.lora_B.weight"])
    return report


def read_adapter_config(path: str | os.PathLike[str]) -> LoraConfig:
    """Read the adapter_config.json of a PEFT folder.

    Raises:
        CheckpointError: it is missing or not JSON.
        AdapterError: it is not a LoRA adapter, or needs a feature we do not have.
    """
    file = Path(path) / CONFIG_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        kind = values.get("peft_type") if isinstance(values, dict) else type(values).__name__
        raise AdapterError(f"{file}: expected an object with peft_type 'LORA', got {kind!r}")
    used = [key for key in _UNSUPPORTED if values.get(key)]
    if used:
        raise AdapterError(f"{file} needs {', '.join(used)}, which this version does not support")
    init = values.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise AdapterError(
            f"{file} has init_lora_weights '{init}', which changed the base model; convert the adapter to plain "
            "LoRA with PEFT first (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    known = {key: values[key] for key in LoraConfig.model_fields if key in values and key != "init_lora_weights"}
    known = {key: value for key, value in known.items() if value is not None}
    try:
        return LoraConfig(**known)
    except ConfigError as error:
        raise AdapterError(f"{file}: {error}") from None


def _peft_config(model: nn.Module, name: str) -> dict[str, Any]:
    """Return the contents of adapter_config.json, with the keys PEFT itself and its other readers look for."""
    values = adapter_configs(model)[name].model_dump(mode="json")
    values["lora_alpha"] = _whole(values["lora_alpha"])
    values["alpha_pattern"] = {key: _whole(alpha) for key, alpha in values["alpha_pattern"].items()}
    targets = values["target_modules"]
    is_word = isinstance(targets, str) and targets.lower() == "all-linear"  # which not every reader knows
    is_narrowed = isinstance(targets, str) and values["layers_to_transform"] is not None  # which PEFT refuses
    if is_word or is_narrowed:
        values["target_modules"] = _target_names(model, name)
    folder = getattr(model, "folder", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    return values | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if folder is None else str(folder),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _target_names(model: nn.Module, name: str) -> list[str]:
    """Return the last names of the adapted layers, or full paths where a last name would match other layers too."""
    adapted = set(lora_layers(model, name))
    names = {path.rsplit(".", 1)[-1] for path in adapted}
    others = [path for path, _ in model.named_modules() if path not in adapted]  # a container's name counts in PEFT
    extra = [path for path in others if path.rsplit(".", 1)[-1] in names]
    return sorted(adapted if extra else names)


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value


def _expected_shapes(model: nn.Module, config: LoraConfig) -> dict[str, tuple[int, int]]:
    layers, shapes = linear_layers(model), {}
    for path in (path for paths in match_modules(model, config).values() for path in paths):
        rank, layer = pattern_value(config.rank_pattern, path, config.r), layers[path]
        shapes[f"{_PREFIX}{path}.lora_A.weight"] = (rank, layer.in_features)
        shapes[f"{_PREFIX}{path}.lora_B.weight"] = (layer.out_features, rank)
    return shapes


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (it is not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from None


def _check_tensors(file: Path, tensors: dict[str, Tensor], expected: dict[str, tuple[int, int]]) -> None:
    problems = [f"{key} is missing (expected shape {shape})" for key, shape in expected.items() if key not in tensors]
    problems += [f"{key} belongs to no layer that the adapter targets" for key in tensors if key not in expected]
    for key, shape in expected.items():
        if key in tensors and tuple(tensors[key].shape) != shape:
            problems.append(f"{key} has shape {tuple(tensors[key].shape)}, expected {shape}")
        elif key in tensors and not tensors[key].is_floating_point():
            problems.append(f"{key} holds {tensors[key].dtype}, expected floating-point numbers")
        elif key in tensors and not torch.isfinite(tensors[key]).all():
            problems.append(f"{key} holds inf or nan")
    if problems:
        more = f"\n  (+{len(problems) - 20} more)" if len(problems) > 20 else ""
        raise CheckpointError(f"{file} does not fit the model:\n  " + "\n  ".join(problems[:20]) + more)
