"""The header of a .safetensors file: checked before a byte of tensor data is read, and made when one is written.

    8 bytes    N, the header's length, little-endian
    N bytes    JSON: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ..., "__metadata__": {...}}
    the rest   the tensors' bytes, end to end without a gap; the offsets count from here

The rules are those of the format's specification (https://github.com/huggingface/safetensors#format). The `safetensors`
package checks them too; here an error names the file, the tensor and the two numbers that differ.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, did_you_mean

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
METADATA_KEY = "__metadata__"

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as its header describes it; `start` and `end` are byte offsets into the file's data part."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: str | os.PathLike[str]) -> dict[str, TensorEntry]:
    """Read and check a file's header; the tensors themselves are not touched.

    Returns:
        name -> entry, in the order of the tensors' bytes.

    Raises:
        CheckpointError: the file is missing, is not safetensors, is truncated or padded, or the header contradicts
            itself (unknown dtype, shape and byte count that differ, overlaps, gaps).
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8:
                raise CheckpointError(f"{path}: file is {size} bytes; a safetensors file starts with an 8-byte length")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: not a safetensors file: its first 8 bytes promise a header of {length} bytes, "
                    f"the format allows {MAX_HEADER_BYTES}"
                )
            if 8 + length > size:
                raise CheckpointError(f"{path}: file is {size} bytes, header promises {8 + length}: it is truncated")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    entries = {name: _entry(path, name, value) for name, value in _parse(path, raw).items() if name != METADATA_KEY}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_layout(path, entries, data_bytes=size - 8 - length)
    return entries


def read_tensors(path: Path, entries: Mapping[str, TensorEntry]) -> dict[str, Tensor]:
    """Read tensors of any shape whose entries came from `read_header` of the same file.

    Nothing is mapped: the file may be deleted afterwards.

    Raises:
        CheckpointError: the file is gone, or shorter than it was.
    """
    tensors = {}
    try:
        with path.open("rb", buffering=0) as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            for name, entry in entries.items():
                tensors[name] = torch.empty(entry.shape, dtype=entry.dtype)
                target = tensors[name].view(-1).view(torch.uint8).numpy().data
                file.seek(start + entry.start)
                while target and (read := file.readinto(target)):
                    target = target[read:]
                if target:
                    raise CheckpointError(f"{path}: {name} cannot be read: the file became shorter")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return tensors


def make_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the length and the header for tensors that will follow end to end, in this order.

    Args:
        tensors: name -> (dtype, shape).
        metadata: further entries beside "format".
    """
    header: dict[str, Any] = {METADATA_KEY: {"format": "pt"} | dict(metadata or {})}  # transformers asks for "format"
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # so that the data starts at a multiple of 8
    return len(raw).to_bytes(8, "little") + raw


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError covers bad UTF-8, bad JSON and absurd integers
        raise CheckpointError(f"{path}: the safetensors header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is a JSON {type(header).__name__}, expected an object")
    metadata = header.get(METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: {METADATA_KEY} must map strings to strings")
    return header


def _entry(path: Path, name: str, value: Any) -> TensorEntry:
    """Check one tensor on its own: known dtype, sane shape, and as many bytes as the two of them need."""

    def wrong(message: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name!r}: {message}")

    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise wrong("its header entry must have exactly dtype, shape and data_offsets")
    dtype_name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise wrong(f"unknown dtype {dtype_name!r}{did_you_mean(str(dtype_name), DTYPES)}")
    if not _is_sizes(shape) or math.prod(size or 1 for size in shape) >= 2**63:
        raise wrong(f"shape {shape!r} is not a list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(f"data_offsets {offsets!r} are not [start, end]")
    dtype = DTYPES[dtype_name]
    start, end = offsets
    needed = math.prod(shape) * dtype.itemsize
    if end - start != needed:
        raise wrong(f"shape {shape} of {dtype_name} needs {needed} bytes, data_offsets give {end - start}")
    return TensorEntry(dtype, tuple(shape), start, end)


def _is_sizes(value: Any) -> bool:
    """Whether `value` is a list of non-negative integers (JSON's true is an int to Python, not to the format)."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_layout(path: Path, entries: Mapping[str, TensorEntry], data_bytes: int) -> None:
    """Check that the tensors, in byte order, cover the data part exactly: no overlap, no gap, nothing missing."""
    expected = 0
    for name, entry in entries.items():
        if entry.start != expected:
            what = "overlaps the tensor before it" if entry.start < expected else "leaves a gap before it"
            raise CheckpointError(f"{path}: tensor {name!r} {what}: starts at {entry.start}, expected {expected}")
        expected = entry.end
    if expected != data_bytes:
        size = path.stat().st_size
        promised = size - data_bytes + expected
        what = "it is truncated" if promised > size else "bytes follow the last tensor"
        raise CheckpointError(f"{path}: file is {size} bytes, header promises {promised}: {what}")
