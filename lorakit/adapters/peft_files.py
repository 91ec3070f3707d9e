"""PEFT's adapter folder, adapter_config.json and adapter_model.safetensors, written and read, strictly.

Reading raises on every missing, unexpected or mis-shaped tensor, where PEFT is silent, and leaves the model as it was.
The file's metadata says which base model the adapter was trained on; another one is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..checkpoints.safetensors_header import make_header
from ..errors import AdapterError, CheckpointError
from ..files import atomic_folder
from .attach import add_adapter, check_adapter, check_name
from .fingerprint import base_fingerprint
from .peft_config import CONFIG_FILE, peft_config, read_adapter_config
from .peft_keys import PREFIX, file_shapes, file_tensors, write_tensors
from .placing import place
from .targeting import MatchReport, unwrapped

WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE_FILE = "adapter_model.bin"
BASE_KEY = "lorakit.base"  # in the metadata: the fingerprint of the base model


def save_peft_folder(
    model: nn.Module, path: str | os.PathLike[str], name: str = "default", dtype: torch.dtype | None = None
) -> Path:
    """Write one adapter as a folder that PEFT loads; whole, or not at all. `save_adapter` without a target is this.

    Args:
        path: the folder; an adapter that stands there is replaced.
        dtype: of the written tensors; None keeps that of the adapter.

    Returns:
        The folder.

    Raises:
        AdapterError: no adapter of that name, or the folder holds something that is not an adapter.
        StorageError: writing failed; what stood there is untouched.
    """
    check_adapter(model, name)
    tensors = {key: tensor.to("cpu", dtype).contiguous() for key, tensor in file_tensors(model, name).items()}
    fingerprint = base_fingerprint(model)
    metadata = {} if fingerprint is None else {BASE_KEY: fingerprint}
    return write_peft_folder(path, tensors, peft_config(model, name), metadata)


def write_peft_folder(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write the two files of an adapter folder, replacing an adapter that stands there, and nothing else.

    Raises:
        AdapterError: the folder holds something that is not an adapter.
        StorageError: writing failed; what stood there is untouched.
    """
    folder = Path(path)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG_FILE).is_file()):
        raise AdapterError(f"{folder} exists and is not an adapter folder; choose another path")
    with atomic_folder(folder) as part:
        _write_tensors(part / WEIGHTS_FILE, tensors, metadata)
        # Sorted as PEFT does, but not within rank_pattern and alpha_pattern: there the first match wins.
        text = json.dumps(dict(sorted(config.items())), indent=2)
        (part / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    return folder


def _write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; the package's own writer puts metadata in another order at every call."""
    tensors = dict(sorted(tensors.items()))
    with file.open("wb") as out:
        out.write(make_header({key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()}, dict(metadata)))
        for tensor in tensors.values():
            out.write(tensor.view(-1).view(torch.uint8).numpy().tobytes())


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    trained: bool = False,
    dtype: torch.dtype = torch.float32,
    max_rank: int | None = None,
    check_base: bool = True,
) -> MatchReport:
    """Attach an adapter from a PEFT folder and make it active.

    Args:
        trained: train it on. False, as for use: it is frozen, and what was trained before stays so.
        dtype: of the adapter in the model.
        max_rank: refuse a higher rank; None: any.
        check_base: refuse an adapter that says it was trained on another base model.

    Raises:
        AdapterError: the name is taken, a target matches nothing, a rank is too high, or the adapter needs a feature we
            do not have.
        CheckpointError: a file is missing or broken or a pickle, a tensor is missing, unexpected, mis-shaped or not
            finite (every such tensor is named), or the base is another one. The model is unchanged.
    """
    folder = Path(path)
    config = read_adapter_config(folder)
    check_name(model, name)
    tensors, metadata = _read_tensors(folder)
    report = MatchReport(name)
    placements = place(model, config, report, is_strict=False)
    highest = max(report.ranks.values(), default=0)
    if max_rank is not None and highest > max_rank:
        where = next(path for path, rank in report.ranks.items() if rank == highest)
        raise AdapterError(f"{folder} has rank {highest} at {where}; the limit is {max_rank}")
    problems = _problems(tensors, file_shapes(placements)) + _other_tables(model, tensors)
    if problems:
        more = f"\n  (+{len(problems) - 20} more)" if len(problems) > 20 else ""
        listing = "\n  ".join(problems[:20])
        raise CheckpointError(f"{folder / WEIGHTS_FILE} does not fit the model:\n  {listing}{more}")
    trained_on, here = metadata.get(BASE_KEY), base_fingerprint(model)
    if check_base and trained_on is not None and trained_on != here:
        raise CheckpointError(
            f"{folder} was trained on another base model of the same shapes: its fingerprint is {trained_on[:16]}, "
            f"this model's {str(here)[:16]}; load it with check_base=False if that is meant"
        )
    report = add_adapter(model, config, name, dtype, trained, is_strict=False)
    write_tensors(model, name, tensors)
    return report


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a folder."""
    file = folder / WEIGHTS_FILE
    if not file.exists() and (folder / _PICKLE_FILE).exists():
        raise CheckpointError(
            f"{folder} has its weights in {_PICKLE_FILE}, a pickle, which can run any code when it is read; convert it "
            f"to {WEIGHTS_FILE} where you trust its source"
        )
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (it is not a dict)
            return tensors, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from None


def _problems(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> list[str]:
    """Say what is wrong with a file's tensors, in one line each."""
    problems = [f"{key} is missing (expected shape {shape})" for key, shape in expected.items() if key not in tensors]
    problems += [
        f"{key} belongs to no layer that the adapter targets"
        for key in tensors
        if key not in expected and not key.endswith(_TABLE)
    ]
    for key, shape in expected.items():
        if key in tensors and tuple(tensors[key].shape) != shape:
            problems.append(f"{key} has shape {tuple(tensors[key].shape)}, expected {shape}")
        elif key in tensors and not tensors[key].is_floating_point():
            problems.append(f"{key} holds {tensors[key].dtype}, expected floating-point numbers")
        elif key in tensors and not torch.isfinite(tensors[key]).all():
            problems.append(f"{key} holds inf or nan")
    return problems


_TABLE = ".base_layer.weight"  # PEFT writes the whole table of an adapted embedding too


def _other_tables(model: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Say where a frozen table that PEFT wrote along is not that of this model; a quantized one cannot be compared."""
    modules = {path: unwrapped(module) for path, module in model.named_modules()}
    problems = []
    for key in (key for key in tensors if key.endswith(_TABLE)):
        module = modules.get(key.removeprefix(PREFIX).removesuffix(_TABLE))
        if not isinstance(module, nn.Embedding | nn.Linear):
            if module is None or not hasattr(module, "packed"):
                problems.append(f"{key} belongs to no layer that the adapter targets")
        elif module.weight.shape != tensors[key].shape:
            problems.append(f"{key} has shape {tuple(tensors[key].shape)}, the model's {tuple(module.weight.shape)}")
        elif not torch.equal(module.weight.detach().cpu(), tensors[key].to(module.weight.dtype)):
            problems.append(f"{key} is the table of another base model, or was changed: it differs from this model's")
    return problems
