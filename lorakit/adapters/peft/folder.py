"""An adapter's folder, read and written without the model: for inspection, export, resizing and comparison.

`read_adapter_folder` checks names, shapes and dtypes of the whole folder at once, from the file's header; the tensors
of a layer are read when that layer is asked for, so that an adapter of any size is walked in the memory of one layer.
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
from ..attach.targeting import rank_and_scaling
from ..config import LoraConfig
from ..low_rank import LowRank
from .config import file_variant, matrix_config, read_config_file
from .names import BASE_KEY, CONFIG_FILE, PICKLE_FILE, PREFIX, WEIGHTS_FILE, matrix_names, path_and_table

Kind = Literal["linear", "embedding", "conv", "experts"]
_Value = TypeVar("_Value")

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AdapterLayer:
    """One layer's tensors, as PEFT stores them, and what they mean.

    Attributes:
        path: of the module in the base model.
        kind: linear (Conv1D included), embedding, conv, or experts (several matrices in one parameter).
        lora_A, lora_B: linear (r, in), (out, r); embedding (r, vocab), (dim, r); conv (r, in, *kernel), (out, r, 1..);
            experts (experts·r, in), (out, r·experts).
        scaling: the factor on B @ A.
        experts: number of matrices; 1 unless kind is experts.
        variant: how the update enters the layer.
        further: what the variant trains beside A and B, table -> tensor, as DoRA's lora_magnitude_vector: (out,),
            embedding (dim,), conv (1, out, 1..).
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
        """The rank r that was allotted, of one expert where there are several."""
        return self.lora_A.shape[0] // self.experts

    def update(self, expert: int = 0, dtype: torch.dtype = torch.float64) -> LowRank:
        """Return scaling * B @ A, (out, in); of a convolution (out, in·kernel), of an embedding (dim, vocab).

        An embedding's and a Conv1D's weight is the transpose of that. It is the whole change of the weight where the
        variant `is_low_rank`. The grouped second convolution that PEFT makes for a grouped base layer becomes
        the block-diagonal matrix that it is.

        Raises:
            ShapeError: there is no such expert.
        """
        if not 0 <= expert < self.experts:
            raise ShapeError(f"{self.path} has {self.experts} matrices; there is no number {expert}")
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
        """Return the record that a layer of this kind would hold, of frozen copies of the tensors."""
        matrices = (LoRAEmbedding if self.kind == "embedding" else LoRALinear).matrices
        tensors = dict(zip(matrices, (self.lora_A, self.lora_B), strict=True)) | dict(self.further)
        # Copied, as tensors in a mapped file are not aligned, and the last bit of a product depends on that.
        frozen = {table: nn.Parameter(tensor.to(dtype, copy=True), False) for table, tensor in tensors.items()}
        return AttachedAdapter(frozen, self.scaling, self.variant, matrices=matrices)


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk.

    Attributes:
        folder: where its two files are.
        config: adapter_config.json as it stands.
        layers: module path -> layer, numbers in paths in rising order; read from the file at each access.
        extras: tensors of other kinds, key without "base_model.model." -> tensor, read at each access: modules_to_save,
            trained biases, replaced token rows, embeddings saved whole.
    """

    folder: Path
    config: dict[str, Any]
    layers: Mapping[str, AdapterLayer]
    extras: Mapping[str, Tensor]

    @property
    def base(self) -> str | None:
        """Fingerprint of the base model that the adapter was trained on, where the file has it."""
        with safe_open(self.folder / WEIGHTS_FILE, framework="pt") as opened:
            return (opened.metadata() or {}).get(BASE_KEY)


def read_adapter_folder(path: str | os.PathLike[str]) -> AdapterFolder:
    """Open a PEFT LoRA adapter: its folder, a folder with one adapter in a subfolder, or a run folder of ours.

    Plain LoRA, rsLoRA, rank and alpha patterns, DoRA, embeddings, convolutions, Conv1D, and expert parameters. Reading
    a layer checks that its numbers are finite.

    Raises:
        AdapterError: no adapter there, or several; it is not a LoRA adapter.
        CheckpointError: a file is missing, broken or a pickle, or a tensor is missing, unexpected, mis-shaped, not
            floating point or, once its layer is read, not finite; every such tensor is named.
    """
    folder = find_adapter_folder(path)
    config = read_config_file(folder / CONFIG_FILE)
    file = weights_file(folder)
    header = read_header(file)
    layers, extras = _sort_names(file, header, config)

    def read(names: Mapping[str, str]) -> dict[str, Tensor]:
        tensors = read_tensors(file, {key: header[name] for key, name in names.items()})
        for key, tensor in tensors.items():
            # The sum is not finite where any number is not, and takes a tenth of the time of looking at each.
            if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
                raise CheckpointError(f"{file}: {names[key]} holds inf or nan")
        return tensors

    return AdapterFolder(
        folder,
        config,
        _Lazy(tuple(layers), lambda path: _layer(layers[path], read(layers[path].names))),
        _Lazy(tuple(extras), lambda key: read({key: extras[key]})[key]),
    )


def find_adapter_folder(path: str | os.PathLike[str]) -> Path:
    """Return the folder of the adapter at `path`: `path` itself, or the one folder in it that holds an adapter.

    Raises:
        AdapterError: no adapter is there, or several are.
    """
    path = Path(path).expanduser()
    if (path / CONFIG_FILE).is_file():
        return path
    if not path.is_dir():
        raise AdapterError(f"{path} is not a folder; expected one that holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    found = sorted(folder for folder in path.iterdir() if (folder / CONFIG_FILE).is_file())
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(folder.name for folder in found)
        raise AdapterError(f"{path} holds several adapters ({names}); name one of these folders")
    raise AdapterError(f"{path} holds no adapter: neither it nor a folder in it has an {CONFIG_FILE}")


def weights_file(folder: Path) -> Path:
    """Return the path of the tensors in an adapter's folder.

    Raises:
        CheckpointError: it is not there; where a pickle is there instead, the message says so.
    """
    file = folder / WEIGHTS_FILE
    if file.is_file():
        return file
    pickled = (
        f"; {PICKLE_FILE} is a pickle, which can run any code when it is read: convert it to {WEIGHTS_FILE} where you "
        "trust its source"
    )
    raise CheckpointError(f"{file} is missing{pickled if (folder / PICKLE_FILE).is_file() else ''}")


def write_adapter_folder(
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


class _Lazy(Mapping[str, _Value]):
    """A mapping whose values are made when they are asked for, and not kept."""

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
    """What the header says of one layer: table -> name of the tensor, and what the config adds."""

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
    """Return path -> layer entry and path -> name of the other tensors, all checked as far as the header allows."""
    config_file = file.with_name(CONFIG_FILE)
    settings, variant = matrix_config(config, config_file), file_variant(config, config_file)
    shapes = {name: entry.shape for name, entry in header.items()}
    problems = [
        f"{name} holds {entry.dtype}, expected floating-point numbers"
        for name, entry in header.items()
        if entry.dtype not in _FLOATS
    ]
    grouped: dict[str, dict[str, str]] = {}
    extras: dict[str, str] = {}
    for name in shapes:
        if (found := path_and_table(name, variant)) is not None:
            path, table = found
            grouped.setdefault(path, {})[table] = name
        elif not name.startswith(PREFIX) or ".lora_" in name:
            expected = matrix_names("<module path>", is_embedding=False)[0]
            problems.append(f"{name} is not a tensor of a LoRA adapter: expected {expected}")
        else:
            extras[name.removeprefix(PREFIX)] = name
    layers = {}
    for path in sorted(grouped, key=_natural):
        entry = _entry(path, grouped[path], shapes, config, settings, variant)
        problems += [f"{PREFIX}{path}: {problem}" for problem in ([entry] if isinstance(entry, str) else [])]
        if isinstance(entry, _Entry):
            layers[path] = entry
    if not problems and not layers:
        problems.append("it holds no LoRA matrix")
    if problems:
        raise CheckpointError(f"{file} does not fit its {CONFIG_FILE}:{listing(problems)}")
    return layers, extras


def _entry(
    path: str,
    names: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
    config: Mapping[str, Any],
    settings: LoraConfig,
    variant: Variant,
) -> _Entry | str:
    """Check one layer's shapes against each other and the config; return its entry, or what is wrong."""
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
                return f"the config says no {one.setting}, but it is here"
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
    """Sort key that puts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"[.]", path)]
