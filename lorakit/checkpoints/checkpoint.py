"""Reading a Hugging Face checkpoint folder tensor by tensor, so that a model never has to fit in memory twice.

A folder holds config.json and either model.safetensors or model.safetensors.index.json with the shards it lists. The
index, every shard's header and every file's size are checked when the folder is opened: a download that stopped half
way is refused before its first weight is read, not after the last.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, did_you_mean
from ..files import read_json_object
from .safetensors_header import TensorEntry, read_header

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a checkpoint folder, by name.

    With both model.safetensors and an index in the folder, model.safetensors is read, as transformers does. A tensor
    that a shard holds but the index does not list is not part of the checkpoint.

    Raises:
        CheckpointError: naming the file, and the tensor where there is one: no weights, a malformed index, a shard that
            is missing, truncated or malformed, or a tensor that is not in the shard where the index says it is.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = _existing_folder(folder)
        if (self.folder / WEIGHTS_FILE).exists():
            self._entries = read_header(self.folder / WEIGHTS_FILE)
            self._files = dict.fromkeys(self._entries, self.folder / WEIGHTS_FILE)
        elif (self.folder / INDEX_FILE).exists():
            self._files = _read_index(self.folder)
            self._entries = _shard_entries(self.folder, self._files)
        else:
            raise CheckpointError(f"{self.folder}: has no {WEIGHTS_FILE} and no {INDEX_FILE}{_advice(self.folder)}")

    @property
    def names(self) -> list[str]:
        """Every tensor's name, in file order."""
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, from the header alone."""
        return self.entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype, from the header alone."""
        return self.entry(name).dtype

    def file(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        self.entry(name)
        return self._files[name]

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor of any shape in its stored dtype, on the CPU.

        The file is mapped copy-on-write: pages are read as they are touched and released with the tensor, and writing
        to the tensor never changes the file.

        Raises:
            CheckpointError: there is no such tensor, or the file changed since it was opened.
        """
        self.entry(name)
        file = self._files[name]
        try:
            # Opened per tensor: parsing the header again costs about a millisecond, and no mapping outlives its tensor.
            with safe_open(file, framework="pt") as handle:
                tensor: torch.Tensor = handle.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{file}: tensor {name!r} cannot be read: {error}") from error
        return tensor

    def config(self) -> dict[str, Any]:
        """Return the folder's config.json."""
        return read_config(self.folder)

    def entry(self, name: str) -> TensorEntry:
        """Return a tensor's header entry: dtype, shape and where its bytes are in its file's data part.

        Raises:
            CheckpointError: there is no such tensor.
        """
        try:
            return self._entries[name]
        except KeyError:
            hint = did_you_mean(name, self._entries)
            raise CheckpointError(f"{self.folder}: there is no tensor {name!r}{hint}") from None


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a checkpoint folder's config.json.

    Raises:
        CheckpointError: the folder or the file is missing, or the file is not a JSON object.
    """
    return read_json_object(_existing_folder(folder) / "config.json")


def _existing_folder(folder: str | os.PathLike[str]) -> Path:
    path = Path(folder)
    if not path.is_dir():
        problem = "is a file, expected a checkpoint folder" if path.exists() else "there is no such folder"
        raise CheckpointError(f"{path}: {problem}")
    return path


def _read_index(folder: Path) -> dict[str, Path]:
    """Return tensor name -> shard file, refusing a shard name that leads out of the folder."""
    index = folder / INDEX_FILE
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: 'weight_map' must map every tensor to its shard")
    for name, shard in weight_map.items():
        # A bare file name: no root, no drive, no separator of either system, no NUL, no way up.
        if not isinstance(shard, str) or shard in ("", ".", "..") or set(shard) & set("/\\:\0"):
            raise CheckpointError(f"{index}: tensor {name!r}: shard {shard!r} is not the name of a file in this folder")
    return {name: folder / shard for name, shard in weight_map.items()}


def _shard_entries(folder: Path, files: dict[str, Path]) -> dict[str, TensorEntry]:
    """Read every shard's header and pick out the tensors the index lists there."""
    shards = sorted(set(files.values()))
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise CheckpointError(f"{folder}: {INDEX_FILE} lists shards that are not here: {', '.join(missing)}")
    headers = {shard: read_header(shard) for shard in shards}
    for name, shard in files.items():
        if name not in headers[shard]:
            raise CheckpointError(f"{shard}: tensor {name!r} is not in this shard, where {INDEX_FILE} says it is")
    return {name: headers[shard][name] for name, shard in files.items()}


def _advice(folder: Path) -> str:
    """Suggest what to do with weights of another kind that the folder holds."""
    if gguf_files := sorted(folder.glob("*.gguf")):
        return f"; convert {gguf_files[0].name} with lorakit.models.gguf.import_gguf"
    if pickles := sorted([*folder.glob("pytorch_model*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]):
        return f"; {pickles[0].name} is a pickle, which lorakit never loads: save the model as safetensors first"
    return ""
