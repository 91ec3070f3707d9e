"""Reading a checkpoint's tensors in bands, one band ahead of whoever uses them.

A thread reads the next band into one of two buffers while the band before it is quantized or copied out of the other,
across tensors and files without a pause, in the order of the bytes on disk. So loading a model takes little longer than
reading its files, and needs two bands of memory besides the result, however large the model.

Plain reads into reused buffers, not a memory map: mapped pages count as resident until the system takes them back, and
every page of a map costs a fault.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import lorakit_kernels as kernels
import torch
from torch import Tensor

from ..errors import CheckpointError, ShapeError
from ..quantization import BLOCK_SIZES, QuantizedWeight, codebook
from ..quantization.policy import WeightFormat
from ..quantization.weight import SOURCE_DTYPES, assemble
from .checkpoint import Checkpoint
from .safetensors_header import read_header

BAND_BYTES = 16 << 20  # 8 to 64 MiB are equally fast
_ALIGNMENT = max(BLOCK_SIZES)  # elements; a band starts at a whole block, whatever the block size


@dataclass(frozen=True)
class Band:
    """A part of a tensor.

    Attributes:
        name: of the tensor.
        start: index of the first element in the flat tensor.
        values: (elements,) in the stored dtype; overwritten after the next band was asked for.
        is_last: whether it completes the tensor.
    """

    name: str
    start: int
    values: Tensor
    is_last: bool


def file_order(checkpoint: Checkpoint, names: Iterable[str]) -> list[str]:
    """Return tensor names in the order of their bytes on disk, file by file."""
    return sorted(names, key=lambda name: (checkpoint.file(name), checkpoint.entry(name).start))


def read_bands(checkpoint: Checkpoint, names: Iterable[str], band_bytes: int = BAND_BYTES) -> Iterator[Band]:
    """Yield the named tensors band by band, in the order of their bytes on disk.

    Raises:
        CheckpointError: naming file and tensor: a file cannot be read, or changed since the checkpoint was opened.
    """
    tasks = list(_tasks(checkpoint, names, band_bytes))
    size = max((task.nbytes for task in tasks), default=0)
    buffers = [torch.empty(size, dtype=torch.uint8) for _ in range(2)]
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read_bands") as reader:
        reads = (reader.submit(task.read, buffers[index % 2]) for index, task in enumerate(tasks))  # begun by next()
        ahead = next(reads, None)
        while ahead is not None:
            band = ahead.result()
            ahead = next(reads, None)
            yield band


def stream_tensors(
    checkpoint: Checkpoint,
    formats: Mapping[str, WeightFormat | None],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    band_bytes: int = BAND_BYTES,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    """Yield (name, tensor) in the order of their bytes on disk, quantized on the way where a format is given.

    Args:
        checkpoint: where the tensors are.
        formats: tensor name -> how to quantize it, or None.
        dtype: of the tensors that are not quantized; None: as stored.
        device: where they all go. Bands are quantized there.
        band_bytes: read at a time.
        progress: called with the bytes of every band that is done.

    Raises:
        CheckpointError: as `read_bands`, or a tensor cannot be quantized: of another dtype, or with inf or nan.
    """
    target: _Dense | _Quantized
    for name, form in formats.items():
        if form is not None and checkpoint.dtype(name) not in SOURCE_DTYPES:
            raise _named(checkpoint, name, f"cannot quantize a tensor of {checkpoint.dtype(name)}")
    for band in read_bands(checkpoint, formats, band_bytes):
        if band.start == 0:
            form, entry = formats[band.name], checkpoint.entry(band.name)
            if form is None:
                target = _Dense(torch.empty(entry.shape, dtype=dtype or entry.dtype, device=device))
            else:
                target = _Quantized(torch.Size(entry.shape), entry.dtype, form, device)
        target.add(band)
        if progress is not None:
            progress(band.values.nbytes)
        if band.is_last:
            try:
                result = target.finish()
            except ShapeError as error:
                raise _named(checkpoint, band.name, str(error)) from None
            yield band.name, result


class _Dense:
    """A tensor that is copied as it is, or to another dtype."""

    def __init__(self, result: Tensor) -> None:
        self.result = result

    def add(self, band: Band) -> None:
        self.result.view(-1)[band.start : band.start + len(band.values)].copy_(band.values)

    def finish(self) -> Tensor:
        return self.result


class _Quantized:
    """A weight whose codes and scales are filled in band by band, as blocks do not depend on each other."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, form: WeightFormat, device: str | torch.device) -> None:
        book, count = codebook(form.quant_type), math.prod(shape)
        self.shape, self.dtype, self.form, self.device = shape, dtype, form, device
        self.boundaries, self.order = book.boundaries.to(device), book.order.to(device)
        self.packed = torch.empty(-(-count // 2), dtype=torch.uint8, device=device)
        self.absmax = torch.empty(-(-count // form.block_size), dtype=torch.float32, device=device)

    def add(self, band: Band) -> None:
        values = band.values.to(self.device)
        packed, absmax = kernels.quantize_4bit(values, self.boundaries, self.order, self.form.block_size)
        byte, block = band.start // 2, band.start // self.form.block_size
        self.packed[byte : byte + len(packed)] = packed
        self.absmax[block : block + len(absmax)] = absmax

    def finish(self) -> QuantizedWeight:
        form = self.form
        return assemble(
            self.packed, self.absmax, self.shape, self.dtype, form.quant_type, form.block_size, form.double_quant
        )


@dataclass(frozen=True)
class _Task:
    """One band to read: `count` elements of a tensor from `start`, which are at byte `offset` of the file."""

    file: Path
    name: str
    offset: int
    dtype: torch.dtype
    start: int
    count: int
    is_last: bool

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    def read(self, buffer: Tensor) -> Band:
        """Fill the start of the buffer."""
        target = buffer[: self.nbytes].numpy().data
        done = 0
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.offset)
                while done < self.nbytes and (read := file.readinto(target[done:])):
                    done += read
        except OSError as error:
            raise CheckpointError(f"{self.file}: tensor {self.name!r} cannot be read: {error}") from error
        if done < self.nbytes:
            raise CheckpointError(f"{self.file}: tensor {self.name!r} cannot be read: the file has become shorter")
        return Band(self.name, self.start, buffer[: self.nbytes].view(self.dtype), self.is_last)


def _tasks(checkpoint: Checkpoint, names: Iterable[str], band_bytes: int) -> Iterator[_Task]:
    ordered = file_order(checkpoint, names)
    origins: dict[Path, int] = {}
    for name in ordered:
        file, entry = checkpoint.file(name), checkpoint.entry(name)
        if file not in origins:
            origins[file] = _data_origin(checkpoint, file, ordered)
        count = math.prod(entry.shape)
        step = max(1, band_bytes // (entry.dtype.itemsize * _ALIGNMENT)) * _ALIGNMENT
        for start in range(0, max(1, count), step):  # a tensor without elements is one empty band
            offset = origins[file] + entry.start + start * entry.dtype.itemsize
            size = min(step, count - start)
            yield _Task(file, name, offset, entry.dtype, start, size, start + size == count)


def _data_origin(checkpoint: Checkpoint, file: Path, names: Iterable[str]) -> int:
    """Return where a file's data part starts, having made sure that the file is still the one that was opened."""
    entries = read_header(file)
    for name in names:
        if checkpoint.file(name) == file and entries.get(name) != checkpoint.entry(name):
            raise CheckpointError(f"{file}: tensor {name!r} cannot be read: the file has changed since it was opened")
    with file.open("rb") as handle:
        return 8 + int.from_bytes(handle.read(8), "little")


def _named(checkpoint: Checkpoint, name: str, message: str) -> CheckpointError:
    return CheckpointError(f"{checkpoint.file(name)}: {name}: {message}")
