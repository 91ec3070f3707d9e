"""`save_adapter` and `load_adapter`: one adapter of a model to PEFT's files, or an export, and from PEFT's files back.

Loading raises on every missing, unexpected or mis-shaped tensor, where PEFT is silent, and leaves the model as it was.
The file's metadata says which base model the adapter was trained on; another one is refused.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import AdapterError, CheckpointError, listing
from .attach.add import add_adapter, check_adapter, check_name
from .attach.placement import plan_placements
from .attach.targeting import MatchReport, unwrapped
from .exports import base_of, check_ranks, export_adapter
from .peft.config import peft_config, read_adapter_config
from .peft.fingerprint import base_fingerprint
from .peft.folder import read_adapter_folder, weights_file, write_adapter_folder
from .peft.names import BASE_KEY, BASE_LAYER, PREFIX, WEIGHTS_FILE
from .peft.tensors import file_shapes, file_tensors, write_tensors

_TABLE = f".{BASE_LAYER}.weight"  # PEFT writes the whole table of an adapted embedding too


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    target: str = "peft",
    dtype: torch.dtype | None = None,
    max_rank: int | None = None,
) -> Path:
    """Write one adapter for a consumer; whole, or not at all.

    Args:
        path: an adapter folder, for "llama.cpp" a GGUF file; one that stands there is replaced.
        target: "peft" (which lorakit and most libraries read), "vllm", "tgi" or "llama.cpp". These three apply one
            setting of the scale to all layers, so that scales go into B; what they cannot serve is refused.
        dtype: of the written tensors; None keeps the adapter's, or takes float32 where an export would round.
        max_rank: refuse ranks above this, such as the --max-lora-rank that vLLM is started with.

    Returns:
        `path`.

    Raises:
        AdapterError: no adapter of that name, an unknown target, something that the target cannot serve, or the path
            holds something that is not an adapter.
        StorageError: writing failed; what stood there is untouched.
    """
    check_adapter(model, name)
    tensors, config, fingerprint = file_tensors(model, name), peft_config(model, name), base_fingerprint(model)
    metadata = {} if fingerprint is None else {BASE_KEY: fingerprint}

    def write(folder: str | os.PathLike[str], dtype: torch.dtype | None) -> Path:
        on_cpu = {key: tensor.to("cpu", dtype).contiguous() for key, tensor in tensors.items()}
        return write_adapter_folder(folder, on_cpu, config, metadata)

    if target == "peft" and max_rank is None:
        return write(path, dtype)
    with tempfile.TemporaryDirectory() as folder:  # the exports read a folder, so that there is one way for both
        written = write(Path(folder) / "adapter", None)
        if target != "peft":
            return export_adapter(written, path, target, base_of(model), dtype, max_rank)
        check_ranks({module: layer.rank for module, layer in read_adapter_folder(written).layers.items()}, max_rank)
    return write(path, dtype)


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    trained: bool = False,
    dtype: torch.dtype = torch.float32,
    max_rank: int | None = None,
    *,
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
    placements = plan_placements(model, config, report, is_strict=False)
    highest = max(report.ranks.values(), default=0)
    if max_rank is not None and highest > max_rank:
        where = next(path for path, rank in report.ranks.items() if rank == highest)
        raise AdapterError(f"{folder} has rank {highest} at {where}; the limit is {max_rank}")
    problems = _problems(tensors, file_shapes(placements)) + _other_tables(model, tensors)
    if problems:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} does not fit the model:{listing(problems)}")
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
    file = weights_file(folder)
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
