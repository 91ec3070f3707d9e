"""Opening a GGUF file: typed metadata, dequantized tensors, and one clear error for whatever is wrong with it.

The `gguf` package does the reading. It trusts the file: a short read gives it an empty array, a wild array length an
endless loop. The subclass here checks every read against the file's size first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from ...errors import CheckpointError, LorakitError

T = TypeVar("T")
# The largest vocabularies in use have about 2**18 tokens; the reader spends some 200 bytes on each item.
_MAX_ARRAY_ITEMS = 2**21


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file: metadata read on demand and checked for type, tensors converted one at a time.

    Attributes:
        path: the file, for error messages.
        fields: metadata key -> gguf.ReaderField.
        tensors: tensor name -> gguf.ReaderTensor.
    """

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, Any]

    def value(self, key: str, kind: type[T]) -> T:
        """Return a required metadata value.

        Raises:
            CheckpointError: it is absent or not of this kind.
        """
        if key not in self.fields:
            raise CheckpointError(f"{self.path}: metadata key '{key}' is missing")
        try:
            value = self.fields[key].contents()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: metadata key '{key}' is not valid UTF-8: {error}") from None
        if kind is float and isinstance(value, float):
            value = float(str(np.float32(value)))  # stored in 32 bits: 1e-05 comes out as 9.999999747378752e-06
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise CheckpointError(
                f"{self.path}: metadata key '{key}' is a {type(value).__name__}, expected {kind.__name__}"
            )
        return value

    def get(self, key: str, kind: type[T]) -> T | None:
        """Return a metadata value, or None if the key is absent."""
        return self.value(key, kind) if key in self.fields else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape in PyTorch's order (GGUF writes the fastest dimension first)."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor of any shape, dequantized to float32.

        Raises:
            CheckpointError: its quantization type is unknown to the gguf package, or a value is not finite.
        """
        from gguf.quants import dequantize

        stored = self.tensors[name]
        try:
            values = dequantize(stored.data, stored.tensor_type)
        except (NotImplementedError, ValueError) as error:
            kind = stored.tensor_type.name
            raise CheckpointError(f"{self.path}: tensor '{name}': {kind} cannot be dequantized: {error}") from error
        tensor = torch.from_numpy(np.require(values, np.float32, ["C", "W"])).reshape(self.shape(name))
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{self.path}: tensor '{name}' holds values that are not finite: the file is damaged")
        return tensor


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file and read its metadata (about 3 s for a vocabulary of 49k tokens, all of it in the gguf package).

    Raises:
        LorakitError: the gguf package is not installed.
        CheckpointError: the file is missing, truncated or not GGUF.
    """
    path = Path(path)
    try:
        reader_class = _checked_reader()
    except ImportError:
        raise LorakitError(f"reading {path.name} needs the gguf package: pip install lorakit[gguf]") from None
    if not path.is_file():
        raise CheckpointError(f"{path}: {'is a folder, expected a GGUF file' if path.is_dir() else 'no such file'}")
    with path.open("rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise CheckpointError(f"{path}: not a GGUF file: it starts with {magic!r}, expected b'GGUF'")
    try:
        with np.errstate(over="ignore"):  # wild sizes overflow in the reader; the checks below it catch them
            reader = reader_class(path)
    except Exception as error:  # on malformed input the reader raises whatever numpy does
        raise CheckpointError(f"{path}: malformed or truncated GGUF file: {error}") from error
    return GGUFFile(path, reader.fields, {tensor.name: tensor for tensor in reader.tensors})


def _checked_reader() -> type[Any]:
    """Return gguf.GGUFReader with every read checked against the file's size (imported late: gguf is an extra)."""
    from gguf import GGUFReader, GGUFValueType

    class CheckedReader(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **kwargs: Any) -> Any:
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > len(self.data):
                raise ValueError(f"file is {len(self.data)} bytes, its contents reach to byte {end}")
            return super()._get(int(offset), dtype, count, *args, **kwargs)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == GGUFValueType.ARRAY:
                length = int(self._get(orig_offs + 4, np.uint64)[0])
                if length > _MAX_ARRAY_ITEMS:
                    raise ValueError(f"a metadata array claims {length} items, at most {_MAX_ARRAY_ITEMS} are read")
            return super()._get_field_parts(orig_offs, raw_type)

    return CheckedReader
