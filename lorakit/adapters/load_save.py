"""`save_adapter` and `load_adapter`: write one adapter of a model to PEFT's files or an export, and load PEFT's files.

Loading raises on every missing, unexpected or mis-shaped tensor, where PEFT is silent, and then leaves the model as it
was. The file's metadata says on which base model the adapter was trained; any other is refused.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import AdapterError, CheckpointError, listing
from .attach.add import add_adapter, check_name
from .attach.placed import Placement
from .attach.placement import plan_placements
from .attach.state import adapter_configs, home_for_new, home_of
from .attach.targeting import MatchReport
from .attach.wrappers import check_joins_training, gathered, in_first_process, named_modules
from .config import LoraConfig, loosely_saved
from .exports import base_of, check_ranks, export_adapter
from .peft.config import find_adapter_folder, peft_config, read_adapter_config
from .peft.fingerprint import check_trained_on, sample_model
from .peft.folder import read_adapter_folder, weights_file, write_adapter_folder
from .peft.names import PREFIX, START_KEY, WEIGHTS_FILE, canonical_name
from .peft.tables import compare_tables, find_tables, needed_tables, take_rows
from .peft.tensors import file_buffers, file_shapes, file_tensors, file_ties, write_tensors
from .starts import find_start


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    target: str = "peft",
    dtype: torch.dtype | None = None,
    max_rank: int | None = None,
) -> Path:
    """Write one adapter for a program that reads it, completely or not at all.

    A compiled or distributed model gives the same file as the plain one. If FSDP has divided it among processes, all of
    them must call this, and the first one writes.

    Args:
        path: an adapter folder, for "llama.cpp" a GGUF file. An existing one is replaced.
        target: "peft" (which lorakit and most libraries read), "vllm", "tgi" or "llama.cpp". These three apply one
            scale to all layers, so the layers' scales go into B; features they cannot serve are refused.
        dtype: of the written tensors; None keeps the adapter's, or takes float32 where an export would round.
        max_rank: refuse ranks above this, such as vLLM's --max-lora-rank.

    Returns:
        `path`.

    Raises:
        AdapterError: there is no adapter of that name, the target is unknown or cannot serve the adapter, or the path
            holds something that is not an adapter.
        StorageError: writing failed; whatever was at `path` is untouched.
    """
    home = home_of(model, name)
    with gathered(model) as is_divided:
        tensors, config = file_tensors(home, name), peft_config(home, name)
        if target == "peft":  # other programs take the base's tables
            tensors |= needed_tables(home, name)
        metadata = sample_model(home, name).to_metadata()
        if (start := adapter_configs(home)[name].start).repairs_quantization:
            metadata[START_KEY] = str(start.name)
        if absent := [key for key, tensor in tensors.items() if tensor.is_meta]:
            raise AdapterError(f"{absent[0]} is on disk or in host memory; save the adapter before it is offloaded")
        if is_divided:  # FSDP1 frees the whole tensors when the context ends
            tensors = {key: tensor.clone() for key, tensor in tensors.items()}

    def write(folder: str | os.PathLike[str], dtype: torch.dtype | None) -> Path:
        cast = {key: dtype if tensor.is_floating_point() else None for key, tensor in tensors.items()}
        on_cpu = {key: tensor.to("cpu", cast[key]).contiguous() for key, tensor in tensors.items()}
        return write_adapter_folder(folder, on_cpu, config, metadata)

    def save() -> None:
        if target == "peft" and max_rank is None:
            write(path, dtype)
            return
        with tempfile.TemporaryDirectory() as folder:  # the exports read a folder: models and folders go the same way
            written = write(Path(folder) / "adapter", None)
            if target != "peft":
                export_adapter(written, path, target, base_of(home), dtype, max_rank)
                return
            check_ranks({path: layer.rank for path, layer in read_adapter_folder(written).layers.items()}, max_rank)
        write(path, dtype)

    in_first_process(save) if is_divided else save()
    return Path(path)


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

    If the vocabulary was resized, the model takes the new rows of its tables from the file, with a warning.

    Args:
        path: the adapter's folder, or that of a run.
        trained: True trains it further. False freezes it and keeps training the adapters that were trained before.
        dtype: of the adapter in the model.
        max_rank: refuse a higher rank; None allows any.
        check_base: refuse an adapter whose file says that it was trained on another base model, or holds another frozen
            table. False also keeps the model's new rows.

    Raises:
        AdapterError: the name is taken, a rank is too high, the adapter needs a feature that lorakit does not have, or
            its tensors do not fit and a name in its config matches nothing.
        CheckpointError: a file is missing, broken or a pickle; a tensor is missing, unexpected, mis-shaped or not
            finite (the message names each); or the base is another one. The model is unchanged.
    """
    if trained:
        check_joins_training(model)
    config = read_adapter_config(path)
    folder = find_adapter_folder(path)
    check_name(model, name)
    with gathered(model):
        return _load(model, folder, config, name, (trained, dtype, max_rank, check_base))


def _load(
    model: nn.Module, folder: Path, config: LoraConfig, name: str, how: tuple[bool, torch.dtype, int | None, bool]
) -> MatchReport:
    """Do what `load_adapter` does, with its arguments trained, dtype, max_rank and check_base in `how`."""
    home, (trained, dtype, max_rank, check_base) = home_for_new(model), how
    tensors, metadata = _read_tensors(folder)
    config = _with_loose_names(home, config, tensors)
    report = MatchReport(name)
    placements = plan_placements(home, config, report, is_strict=False)
    highest = max(report.ranks.values(), default=0)
    if max_rank is not None and highest > max_rank:
        where = next(path for path, rank in report.ranks.items() if rank == highest)
        raise AdapterError(f"{folder} has rank {highest} at {where}; the limit is {max_rank}")
    tables = find_tables(home, tensors.keys() - file_shapes(placements).keys() - file_ties(placements).keys())
    problems = _problems({key: tensor for key, tensor in tensors.items() if key not in tables}, placements)
    other_tables, new_rows = compare_tables(home, tensors, tables) if check_base else ([], [])
    if problems := problems + other_tables:
        error = AdapterError if report.missed else CheckpointError
        raise error(f"{folder / WEIGHTS_FILE} does not fit the model:{listing(report.missed + problems)}")
    if check_base:
        check_trained_on(home, metadata, {placement.path for placement in placements}, folder)
    marked = config
    if START_KEY in metadata:  # for merges, and for the next file
        marked = config.model_copy(update={"init_lora_weights": find_start(metadata[START_KEY]).name})
    report = add_adapter(model, config, name, dtype, trained, is_strict=False)
    write_tensors(home, name, tensors)
    take_rows(home, name, tables, new_rows)
    adapter_configs(home)[name] = marked
    report.source, report.is_trained = folder, trained
    return report


def _with_loose_names(home: nn.Module, config: LoraConfig, tensors: Mapping[str, Tensor]) -> LoraConfig:
    """Return a file's settings with the further modules whose copies the file has, since PEFT matched their names."""
    paths = [path for path, _ in named_modules(home)]
    further = [
        path
        for path in loosely_saved(config.modules_to_save or (), paths)
        if any(key.startswith(f"{PREFIX}{path}.") for key in tensors)
    ]
    saved = [*(config.modules_to_save or ()), *further]
    return config.model_copy(update={"modules_to_save": saved}) if further else config


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors, under their canonical names, and the metadata of a folder."""
    file = weights_file(folder)
    try:
        with safe_open(file, framework="pt") as opened:
            names = {key: canonical_name(key) for key in opened.keys()}  # noqa: SIM118 (it is not a dict)
            if len(set(names.values())) < len(names):
                raise CheckpointError(f"{file} holds a tensor twice, with and without the prefix {PREFIX}")
            return {name: opened.get_tensor(key) for key, name in names.items()}, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from None


def _problems(tensors: dict[str, Tensor], placements: Sequence[Placement]) -> list[str]:
    """Return what is wrong with a file's tensors, one line for each."""
    shapes, buffers, ties = file_shapes(placements), file_buffers(placements), file_ties(placements)
    expected = shapes | {key: tuple(buffer.shape) for key, buffer in buffers.items()}
    problems = [f"{key} is missing (expected shape {shape})" for key, shape in expected.items() if key not in tensors]
    expected |= {key: shapes[trained] for key, trained in ties.items()}
    problems += [f"{key} belongs to no layer that the adapter targets" for key in tensors if key not in expected]
    for key, shape in expected.items():
        if key in tensors and (problem := _problem(tensors[key], shape, buffers.get(key))):
            problems.append(f"{key} {problem}")
        elif key in ties.keys() & tensors.keys() and not torch.equal(
            tensors[key], tensors.get(ties[key], tensors[key])
        ):
            problems.append(f"{key} differs from {ties[key]}, and the two are one parameter here")
    return problems


def _problem(tensor: Tensor, shape: tuple[int, ...], buffer: Tensor | None) -> str | None:
    """Return what is wrong with one tensor of a file."""
    is_float = buffer is None or buffer.is_floating_point()
    if tuple(tensor.shape) != shape:
        return f"has shape {tuple(tensor.shape)}, expected {shape}"
    if tensor.is_floating_point() != is_float:
        return f"holds {tensor.dtype}, expected {'floating-point numbers' if is_float else str(buffer.dtype)}"  # type: ignore[union-attr]
    return None if torch.isfinite(tensor).all() else "holds inf or nan"
