"""An adapter from its files alone, without the model it belongs to: for inspection, export, resizing and comparison.

`read_adapter_folder` checks names, shapes and dtypes of the whole folder at once, from the file's header; the tensors
of a layer are read when that layer is asked for, so that an adapter of any size is walked in the memory of one layer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ..checkpoints.safetensors_header import TensorEntry, read_header, read_tensors
from ..errors import AdapterError, CheckpointError, ShapeError
from .low_rank import LowRank
from .peft_config import CONFIG_FILE, read_lora_json
from .peft_files import WEIGHTS_FILE
from .targeting import pattern_value

Kind = Literal["linear", "embedding", "conv", "experts"]
_Value = TypeVar("_Value")

_PREFIX = "base_model.model."
_PICKLE_FILE = "adapter_model.bin"
_ROLES = {  # how a tensor's key ends -> which of a layer's tensors it is
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_B.bias": "bias",
    ".lora_embedding_A": "lora_A",
    ".lora_embedding_B": "lora_B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",  # as PEFT before 0.11 wrote it
}
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
        magnitude: DoRA's, (out,), embedding (dim,), conv (1, out, 1..), or None.
        bias: on lora_B, (out,), or None.
        experts: number of matrices; 1 unless kind is experts.
    """

    path: str
    kind: Kind
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    experts: int = 1

    @property
    def rank(self) -> int:
        """The rank r that was allotted, of one expert where there are several."""
        return self.lora_A.shape[0] // self.experts

    def update(self, expert: int = 0, dtype: torch.dtype = torch.float64) -> LowRank:
        """Return scaling * B @ A, (out, in); of a convolution (out, in·kernel), of an embedding (dim, vocab).

        An embedding's and a Conv1D's weight is the transpose of that. DoRA's magnitude is not in it: that part of the
        change needs the base weight. The grouped second convolution that PEFT makes for a grouped base layer becomes
        the block-diagonal matrix that it is.

        Raises:
            ShapeError: there is no such expert.
        """
        if not 0 <= expert < self.experts:
            raise ShapeError(f"{self.path} has {self.experts} matrices; there is no number {expert}")
        a, b = self.lora_A.to(dtype), self.lora_B.to(dtype, copy=True).mul_(self.scaling)
        if self.kind == "experts":
            a = a.reshape(self.experts, self.rank, -1)[expert]
            b = b.reshape(b.shape[0], self.rank, self.experts)[:, :, expert]
        if self.kind == "conv":
            a, b = a.flatten(1), b.flatten(1)
            groups = a.shape[0] // b.shape[1]
            b = torch.block_diag(*b.chunk(groups)) if groups > 1 else b
        return LowRank(b, a)


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


def read_adapter_folder(path: str | os.PathLike[str]) -> AdapterFolder:
    """Open a PEFT LoRA adapter: its folder, a folder with one adapter in a subfolder, or a run folder of ours.

    Plain LoRA, rsLoRA, rank and alpha patterns, DoRA, embeddings, convolutions, Conv1D, and expert parameters. Reading
    a layer checks that its numbers are finite.

    Raises:
        AdapterError: no adapter there, or several; it is not a LoRA adapter; its weights are a pickle.
        CheckpointError: a file is missing or broken, or a tensor is missing, unexpected, mis-shaped, not floating
            point or, once its layer is read, not finite; every such tensor is named.
    """
    folder = _find(Path(path).expanduser())
    config = _read_config(folder / CONFIG_FILE)
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        pickled = f"; {_PICKLE_FILE} is a pickle, which is never loaded: save it with PEFT as safetensors"
        raise CheckpointError(f"{file} is missing{pickled if (folder / _PICKLE_FILE).is_file() else ''}")
    header = read_header(file)
    layers, extras = _sort_keys(file, header, config)

    def read(keys: Mapping[str, str]) -> dict[str, Tensor]:
        tensors = read_tensors(file, {name: header[key] for name, key in keys.items()})
        for name, tensor in tensors.items():
            # The sum is not finite where any number is not, and takes a tenth of the time of looking at each.
            if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
                raise CheckpointError(f"{file}: {keys[name]} holds inf or nan")
        return tensors

    return AdapterFolder(
        folder,
        config,
        _Lazy(tuple(layers), lambda path: _layer(layers[path], read(layers[path].keys))),
        _Lazy(tuple(extras), lambda key: read({key: extras[key]})[key]),
    )


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
    """What the header says of one layer: role -> key, and what the config adds."""

    path: str
    kind: Kind
    keys: dict[str, str]
    scaling: float
    experts: int


def _find(path: Path) -> Path:
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


def _read_config(file: Path) -> dict[str, Any]:
    config = read_lora_json(file)
    numbers = {"r": config.get("r", 8), "lora_alpha": config.get("lora_alpha", 8)}  # PEFT's defaults
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{file}: {key} is {patterns!r}, expected an object")
        numbers |= {f"{key}.{pattern}": value for pattern, value in patterns.items()}
    for key, value in numbers.items():
        is_rank = key == "r" or key.startswith("rank_pattern")
        if type(value) not in ((int,) if is_rank else (int, float)) or not 0 < value < 1e9:
            expected = "a whole number from 1" if is_rank else "a number above 0"
            raise CheckpointError(f"{file}: {key} is {value!r}, expected {expected}")
    return config


def _sort_keys(
    file: Path, header: Mapping[str, TensorEntry], config: dict[str, Any]
) -> tuple[dict[str, _Entry], dict[str, str]]:
    """Return path -> layer entry and name -> key of the other tensors, all checked as far as the header allows."""
    shapes = {key: entry.shape for key, entry in header.items()}
    problems = [
        f"{key} holds {entry.dtype}, expected floating-point numbers"
        for key, entry in header.items()
        if entry.dtype not in _FLOATS
    ]
    grouped: dict[str, dict[str, str]] = {}
    extras: dict[str, str] = {}
    for key in shapes:
        suffix = next((suffix for suffix in _ROLES if key.endswith(suffix)), None)
        if not key.startswith(_PREFIX) or (".lora_" in key and suffix is None):
            problems.append(f"{key} is not a tensor of a LoRA adapter: expected {_PREFIX}<module path>.lora_A.weight")
        elif suffix is None:
            extras[key.removeprefix(_PREFIX)] = key
        else:
            grouped.setdefault(key[len(_PREFIX) : -len(suffix)], {})[_ROLES[suffix]] = key
    layers = {}
    for path in sorted(grouped, key=_natural):
        entry = _entry(path, grouped[path], shapes, config)
        problems += [f"{_PREFIX}{path}: {problem}" for problem in ([entry] if isinstance(entry, str) else [])]
        if isinstance(entry, _Entry):
            layers[path] = entry
    if not problems and not layers:
        problems.append("it holds no LoRA matrix")
    if problems:
        more = f"\n  (+{len(problems) - 20} more)" if len(problems) > 20 else ""
        raise CheckpointError(f"{file} does not fit its {CONFIG_FILE}:\n  " + "\n  ".join(problems[:20]) + more)
    return layers, extras


def _entry(path: str, keys: dict[str, str], shapes: dict[str, tuple[int, ...]], config: dict[str, Any]) -> _Entry | str:
    """Check one layer's shapes against each other and the config; return its entry, or what is wrong."""
    for role in ("lora_A", "lora_B"):
        if role not in keys:
            return f"{role} is missing (there is {', '.join(keys)})"
    a, b = shapes[keys["lora_A"]], shapes[keys["lora_B"]]
    rank: int = pattern_value(config.get("rank_pattern") or {}, path, config.get("r", 8))
    alpha: float = pattern_value(config.get("alpha_pattern") or {}, path, config.get("lora_alpha", 8))
    kind: Kind = "embedding" if "lora_embedding" in keys["lora_A"] else "conv" if len(a) > 2 else "linear"
    is_experts = kind == "linear" and bool(config.get("target_parameters")) and len(a) == 2 and a[0] > rank
    experts = a[0] // rank if is_experts else 1
    if len(a) < 2 or len(b) != len(a) or (kind != "conv" and len(a) != 2):
        return f"lora_A {a} and lora_B {b} are not two matrices"
    if a[0] != experts * rank:
        return f"lora_A has shape {a}, but the config says rank {rank}"
    if b[1] != a[0] and not (kind == "conv" and b[1] and a[0] % b[1] == 0 and b[0] % (a[0] // b[1]) == 0):
        return f"lora_A {a} and lora_B {b} do not multiply"
    if bool(config.get("use_dora")) != ("magnitude" in keys):
        said = (
            "use_dora, but lora_magnitude_vector is missing"
            if config.get("use_dora")
            else "no use_dora, but it is here"
        )
        return f"the config says {said}"
    for role in ("magnitude", "bias"):
        if role in keys and max(shapes[keys[role]], default=0) != b[0]:
            return f"{role} has shape {shapes[keys[role]]}, expected ({b[0]},)"
    scaling = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    return _Entry(path, "experts" if experts > 1 else kind, keys, scaling, experts)


def _layer(entry: _Entry, tensors: Mapping[str, Tensor]) -> AdapterLayer:
    return AdapterLayer(
        entry.path, entry.kind, tensors["lora_A"], tensors["lora_B"], entry.scaling,
        tensors.get("magnitude"), tensors.get("bias"), entry.experts,
    )  # fmt: skip


def _natural(path: str) -> list[tuple[int, str]]:
    """Sort key that puts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"[.]", path)]
