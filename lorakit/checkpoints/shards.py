"""Writing a checkpoint folder: shards, one tensor at a time, their index, and the small files beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..files import atomic_write, write_text
from ..quantization.bnb_format import Layout
from .checkpoint import INDEX_FILE, WEIGHTS_FILE
from .safetensors_header import make_header, read_header

SHARD_BYTES = 5_000_000_000
PLAN_FILE = "lorakit-plan.json"  # in a folder that is being quantized
MANIFEST_FILE = "lorakit-manifest.json"  # hashes of a known model's files

_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_NOT_COPIED = {"config.json", WEIGHTS_FILE, INDEX_FILE, MANIFEST_FILE, PLAN_FILE}
_LICENSES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")


def grouped(sizes: Mapping[str, int], shard_bytes: int) -> dict[str, list[str]]:
    """Assign tensors to shards, filling one after the other: file -> names, in the order given.

    Args:
        sizes: name -> bytes.
        shard_bytes: most bytes in one file; a larger tensor gets a file of its own.
    """
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(name)
        room -= size
    files = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    return dict(zip(files if len(groups) > 1 else [WEIGHTS_FILE], groups, strict=True))


def write_shard(path: Path, expected: Mapping[str, Layout], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write one file, whole or not at all.

    The header is written last: only then is the length of each state's JSON known. Tensors whose size is not a multiple
    of 8 bytes, which are the small ones, come after all others, so that each starts at a multiple of its itemsize.

    Args:
        path: of the file.
        expected: name -> (dtype, shape) of the tensors at their largest; the header leaves room for these.
        tensors: (name, tensor) of any shape, on the CPU.
    """
    room = len(make_header(expected)) + 32 * len(expected)  # offsets may have more digits in another order
    layouts: dict[str, Layout] = {}
    odd: dict[str, Tensor] = {}
    with atomic_write(path) as part, part.open("wb") as file:

        def write(name: str, tensor: Tensor) -> None:
            layouts[name] = tensor.dtype, tuple(tensor.shape)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)

        file.seek(room)
        for name, tensor in tensors:
            if tensor.nbytes % 8:
                odd[name] = tensor
            else:
                write(name, tensor)
        for name, tensor in sorted(odd.items(), key=lambda item: -item[1].itemsize):
            write(name, tensor)
        header = make_header(layouts)[8:].ljust(room - 8)
        file.seek(0)
        file.write(len(header).to_bytes(8, "little") + header)


def write_index(folder: Path, shards: Sequence[str]) -> int:
    """Write the index of a folder's shards, if there are several; return the bytes of all tensors."""
    headers = {file: read_header(folder / file) for file in shards}
    total = sum(entry.end - entry.start for header in headers.values() for entry in header.values())
    if len(headers) > 1:
        weight_map = {name: file for file, header in headers.items() for name in header}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    return total


def copy_small_files(source: Path, target: Path) -> None:
    """Copy tokenizer, generation settings and license, but neither config.json nor weights."""
    for file in sorted(source.iterdir()):
        wanted = file.suffix in _COPIED or file.name.upper().startswith(_LICENSES)
        if wanted and file.name not in _NOT_COPIED and file.is_file():
            with atomic_write(target / file.name) as part:
                shutil.copyfile(file, part)
