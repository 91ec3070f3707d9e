"""An adapter's folder, read and written without the model, for inspection, export, resizing and comparison.

`read_adapter_folder` checks the names, shapes and dtypes of all tensors at once, from the file's header. Each access to
a layer reads its tensors, so going through an adapter of any size takes the memory of one layer.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ...checkpoints.safetensors_header import TensorEntry, make_header, read_header, read_tensors
from ...errors import AdapterError, CheckpointError, ShapeError, listing
from ...files import atomic_folder
from ...layers import VARIANTS, AttachedAdapter, LoRAEmbedding, LoRALinear, Variant
from ..attach.targeting import rank_and_scaling, saved_matcher
from ..config import LoraConfig
from ..low_rank import LowRank
from .config import file_variant, find_adapter_folder, matrix_config, read_config_file
from .fingerprint import BaseSample
from .names import (
    BASE_KEY,
    BASE_LAYER,
    BASE_SAMPLE_KEY,
    CONFIG_FILE,
    PICKLE_FILE,
    PREFIX,
    START_KEY,
    WEIGHTS_FILE,
    canonical_name,
    matrix_names,
    path_and_table,
)

Kind = Literal["linear", "embedding", "conv", "experts"]
_Value = TypeVar("_Value")

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AdapterLayer:
    """One layer's tensors as PEFT stores them, with their meaning.

    Attributes:
        path: of the module in the base model.
        kind: linear (Conv1D included), embedding, conv, or experts (several matrices in one parameter).
        lora_A, lora_B: linear (r, in), (out, r); embedding (r, vocab), (dim, r); conv (r, in, *kernel), (out, r, 1..);
            experts (experts·r, in), (out, r·experts).
        scaling: the factor on B @ A.
        experts: number of matrices; 1 unless kind is experts.
        variant: how the update enters the layer.
        further: the variant's trained tensors besides A and B, table -> tensor, such as DoRA's lora_magnitude_vector:
            (out,), embedding (dim,), conv (1, out, 1..).
    """

    path: str
    kind: Kind
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    experts: int = 1
    variant: Variant = VARIANTS["plain"]
    further: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The rank r; of one expert where there are several."""
        return self.lora_A.shape[0] // self.experts

    def update(self, expert: int = 0, dtype: torch.dtype = torch.float64) -> LowRank:
        """Return scaling * B @ A, (out, in); of a convolution (out, in·kernel), of an embedding (dim, vocab).

        The weight of an embedding or a Conv1D has the transposed shape. If the variant `is_low_rank`, this is the whole
        change of the weight. PEFT's grouped second convolution for a grouped base layer becomes a block-diagonal
        matrix.

        Raises:
            ShapeError: there is no such expert.
        """
        if not 0 <= expert < self.experts:
            raise ShapeError(f"{self.path} has {self.experts} matrices, numbered from 0; there is no number {expert}")
        if self.kind in ("linear", "embedding"):
            return LowRank(*self.variant.factors(self.attached(dtype)))
        a, b = self.lora_A.to(dtype), self.lora_B.to(dtype, copy=True).mul_(self.scaling)
        if self.kind == "experts":
            a = a.reshape(self.experts, self.rank, -1)[expert]
            b = b.reshape(b.shape[0], self.rank, self.experts)[:, :, expert]
        if self.kind == "conv":
            a, b = a.flatten(1), b.flatten(1)
            groups = a.shape[0] // b.shape[1]
            b = torch.block_diag(*b.chunk(groups)) if groups > 1 else b
        return LowRank(b, a)

    def attached(self, dtype: torch.dtype) -> AttachedAdapter:
        """Return the record that a layer of this kind would hold, with frozen copies of the tensors."""
        matrices = (LoRAEmbedding if self.kind == "embedding" else LoRALinear).matrices
        further = {table: tensor.flatten() for table, tensor in self.further.items()}  # a convolution's has ones
        tensors = dict(zip(matrices, (self.lora_A, self.lora_B), strict=True)) | further
        # Copies are aligned, unlike tensors in a mapped file; the last bit of a product depends on the alignment.
        frozen = {table: nn.Parameter(tensor.to(dtype, copy=True), False) for table, tensor in tensors.items()}
        return AttachedAdapter(frozen, self.scaling, self.variant, matrices=matrices)


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk.

    Attributes:
        folder: the folder of its two files.
        config: the unchanged contents of adapter_config.json.
        layers: module path -> layer, ordered by the numbers in the paths; each access reads the file.
        extras: other tensors, key without "base_model.model." -> tensor; each access reads the file. They are
            modules_to_save, trained biases, trained token rows and embeddings saved in full.
    """

    folder: Path
    config: dict[str, Any]
    layers: Mapping[str, AdapterLayer]
    extras: Mapping[str, Tensor]

    @property
    def metadata(self) -> dict[str, str]:
        """What the weights' file says of the base model on which the adapter was trained."""
        with safe_open(self.folder / WEIGHTS_FILE, framework="pt") as opened:
            found = opened.metadata() or {}
        return {key: found[key] for key in (BASE_SAMPLE_KEY, BASE_KEY, START_KEY) if key in found}

    @property
    def base(self) -> BaseSample | None:
        """Samples of the weights of that base model, or None if the file has none.

        Raises:
            CheckpointError: they are damaged.
        """
        return BaseSample.from_metadata(self.metadata, self.folder / WEIGHTS_FILE)


def read_adapter_folder(path: str | os.PathLike[str]) -> AdapterFolder:
    """Open a PEFT LoRA adapter: its folder, a folder with one adapter in a subfolder, or a lorakit run's folder.

    It reads plain LoRA, rsLoRA, rank and alpha patterns, DoRA, embeddings, convolutions, Conv1D and expert parameters.
    Reading a layer checks that its numbers are finite.

    Raises:
        AdapterError: there is no adapter, there are several, or it is not a LoRA adapter.
        CheckpointError: a file is missing, broken or a pickle; or a tensor is missing, unexpected, mis-shaped, not
            floating point or, when its layer is read, not finite. The message names each such tensor.
    """
    folder = find_adapter_folder(path)
    config = read_config_file(folder / CONFIG_FILE)
    file = weights_file(folder)
    header = read_header(file)
    layers, extras = _sort_names(file, header, config)

    def read(names: Mapping[str, str]) -> dict[str, Tensor]:
        tensors = read_tensors(file, {key: header[name] for key, name in names.items()})
        for key, tensor in tensors.items():
            # If a number is not finite, the sum is not either; it takes a tenth of the time of testing each number.
            if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
                raise CheckpointError(f"{file}: {names[key]} holds inf or nan")
        return tensors

    return AdapterFolder(
        folder,
        config,
        _Lazy(tuple(layers), lambda path: _layer(layers[path], read(layers[path].names))),
        _Lazy(tuple(extras), lambda key: read({key: extras[key]})[key]),
    )


def weights_file(folder: Path) -> Path:
    """Return the path of the tensors in an adapter's folder.

    Raises:
        CheckpointError: the file is missing; the message says so if there is a pickle instead.
    """
    file = folder / WEIGHTS_FILE
    if file.is_file():
        return file
    advice = (
        f"; {PICKLE_FILE} is a pickle, which can run any code when it is read: convert it to {WEIGHTS_FILE} if you "
        "trust its source"
    )
    raise CheckpointError(f"{file} is missing{advice if (folder / PICKLE_FILE).is_file() else ''}")


def write_adapter_folder(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write the two files of an adapter folder, replacing an adapter that is already there, but nothing else.

    Args:
        tensors: name in PEFT's format -> contiguous tensor on the CPU, of any shape.
        config: the contents of adapter_config.json.
        metadata: of the weights' file.

    Raises:
        AdapterError: the folder holds something that is not an adapter.
        StorageError: writing failed; whatever was at `path` is untouched.
    """
    folder = Path(path)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG_FILE).is_file()):
        raise AdapterError(f"{folder} exists and is not an adapter folder; choose another path")
    with atomic_folder(folder) as unfinished:
        _write_tensors(unfinished / WEIGHTS_FILE, tensors, metadata)
        # Sorted as PEFT does, but not within rank_pattern and alpha_pattern: there the first match wins.
        text = json.dumps(dict(sorted(config.items())), indent=2)
        (unfinished / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    return folder


def _write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with the same bytes every time; the package's own writer reorders metadata."""
    tensors = dict(sorted(tensors.items()))
    with file.open("wb") as out:
        out.write(make_header({key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()}, dict(metadata)))
        for tensor in tensors.values():
            out.write(tensor.view(-1).view(torch.uint8).numpy().tobytes())


class _Lazy(Mapping[str, _Value]):
    """A mapping that makes its values at each access and does not keep them."""

    def __init__(self, names: tuple[str, ...], make: Callable[[str], _Value]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> _Value:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


@dataclass(frozen=True)
class _Entry:
    """One layer as the header and the config describe it; `names` maps a table to its tensor's name in the file."""

    path: str
    kind: Kind
    names: dict[str, str]
    matrices: tuple[str, str]
    scaling: float
    experts: int
    variant: Variant


def _sort_names(
    file: Path, header: Mapping[str, TensorEntry], config: dict[str, Any]
) -> tuple[dict[str, _Entry], dict[str, str]]:
    """Return path -> layer entry and key -> name of the other tensors, all checked as far as the header allows."""
    config_file = file.with_name(CONFIG_FILE)
    settings, variant = matrix_config(config, config_file), file_variant(config, config_file)
    shapes = {name: entry.shape for name, entry in header.items()}
    problems = [
        f"{name} holds {entry.dtype}, expected floating-point numbers"
        for name, entry in header.items()
        if entry.dtype not in _FLOATS and (path_and_table(name, variant) is not None or not name.startswith(PREFIX))
    ]  # modules saved in full have counters too
    by_path: dict[str, dict[str, str]] = {}
    extras: dict[str, str] = {}
    for name in shapes:
        key = canonical_name(name)
        is_copy, is_explained = _explanation(key, config)
        if not is_copy and (path_table := path_and_table(key, variant)) is not None:
            path, table = path_table
            if name != by_path.setdefault(path, {}).setdefault(table, name):
                problems.append(f"{name} is the same tensor as {by_path[path][table]}")
        elif not is_explained and (not name.startswith(PREFIX) or ".lora_" in name):
            expected = matrix_names("<module path>", is_embedding=False)[0]
            problems.append(f"{name} is not a tensor of a LoRA adapter: expected {expected}")
        elif name != extras.setdefault(key.removeprefix(PREFIX), name):
            problems.append(f"{name} is the same tensor as {extras[key.removeprefix(PREFIX)]}")
    layers = {}
    for path in sorted(by_path, key=_natural):
        entry = _entry(path, by_path[path], shapes, config, settings, variant)
        if isinstance(entry, _Entry):
            layers[path] = entry
        else:
            problems.append(f"{PREFIX}{path}: {entry}")
    if not problems and not layers:
        problems.append("it holds no LoRA matrix")
    if problems:
        raise CheckpointError(f"{file} does not fit its {CONFIG_FILE}:{listing(problems)}")
    return layers, extras


def _explanation(name: str, config: Mapping[str, Any]) -> tuple[bool, bool]:
    """Return whether a tensor is of modules_to_save, and whether some setting asks for it though it is no matrix."""
    path, _, leaf = name.removeprefix(PREFIX).rpartition(".")
    saved = config.get("modules_to_save")
    names = saved if isinstance(saved, list) else []
    is_copy = any(isinstance(one, str) and saved_matcher(one)(path) for one in names)
    is_bias = leaf == "bias" and config.get("bias", "none") != "none"
    return is_copy, is_copy or is_bias or path.endswith((".token_adapter", f".{BASE_LAYER}"))


def _entry(
    path: str,
    names: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
    config: Mapping[str, Any],
    settings: LoraConfig,
    variant: Variant,
) -> _Entry | str:
    """Check one layer's shapes against each other and the config; return its entry or a description of the problem."""
    is_embedding = any(table in names for table in LoRAEmbedding.matrices)
    matrices = LoRAEmbedding.matrices if is_embedding else LoRALinear.matrices
    if missing := [table for table in matrices if table not in names]:
        return f"{missing[0]} is missing (there is {', '.join(names)})"
    a, b = (shapes[names[table]] for table in matrices)
    rank, scaling = rank_and_scaling(settings, path)
    kind: Kind = "embedding" if is_embedding else "conv" if len(a) > 2 else "linear"
    is_experts = kind == "linear" and bool(config.get("target_parameters")) and len(a) == 2 and a[0] > rank
    experts = a[0] // rank if is_experts else 1
    if len(a) < 2 or len(b) != len(a) or (kind != "conv" and len(a) != 2):
        return f"lora_A {a} and lora_B {b} are not two matrices"
    if a[0] != experts * rank:
        return f"lora_A has shape {a}, but the config says rank {rank}"
    if b[1] != a[0] and not (kind == "conv" and b[1] and a[0] % b[1] == 0 and b[0] % (a[0] // b[1]) == 0):
        return f"lora_A {a} and lora_B {b} do not multiply"
    for one in VARIANTS.values():
        for table in one.trained:
            if one is not variant and table in names:
                return f"the config says no {one.setting}, but the file holds {one.further}"
            if one is variant and table not in names and not one.may_lack_further:
                return f"the config says {one.setting}, but {table} is missing"
    for table in (table for table in variant.trained if table in names):
        if max(shapes[names[table]], default=0) != b[0]:
            return f"{table} has shape {shapes[names[table]]}, expected ({b[0]},)"
    return _Entry(path, "experts" if experts > 1 else kind, names, matrices, scaling, experts, variant)


def _layer(entry: _Entry, tensors: Mapping[str, Tensor]) -> AdapterLayer:
    lora_a, lora_b = (tensors[table] for table in entry.matrices)
    further = {table: tensors[table] for table in entry.variant.trained if table in tensors}
    return AdapterLayer(entry.path, entry.kind, lora_a, lora_b, entry.scaling, entry.experts, entry.variant, further)


def _natural(path: str) -> list[tuple[int, str]]:
    """Return a sort key that puts layers.2 before layers.10."""
    return [(int(name), "") if name.isdigit() else (-1, name) for name in re.split(r"[.]", path)]
