"""Reading a checkpoint's tensors in bands, and quantizing them on the way.

Two workers take one band after the other, in the order of the bytes on disk, across tensors and files without a pause.
One worker reads while the other quantizes, or copies out, the band that it has read. If the disk is the slower part,
loading takes little longer than reading the files; if the processors are, they stay busy. Besides the result, loading
needs two bands of memory, however large the model.

Bands are read into reused buffers, not mapped: mapped pages count as resident until the system takes them back, and
every page of a map costs a fault.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

import lorakit_kernels as kernels
import torch
from torch import Tensor

from ..errors import CheckpointError, ShapeError
from ..quantization import BLOCK_SIZES, QuantizedWeight, codebook
from ..quantization.policy import WeightFormat
from ..quantization.weight import SOURCE_DTYPES, assemble
from .checkpoint import Checkpoint
from .safetensors_header import read_header

BAND_BYTES = 4 << 20  # up to 64 MiB are as fast; at 1 MiB the handover shows
_WORKERS = 2
_AHEAD = 8  # finished bands that may wait for the caller, so that the workers need not
_ALIGNMENT = max(BLOCK_SIZES)  # elements; a band starts where a block does, whatever the block size


@dataclass(frozen=True)
class Band:
    """A part of a tensor, and where it is.

    Attributes:
        file: the file that holds it.
        name: the tensor's.
        offset: position of its first byte in the file.
        dtype: as stored.
        start: index of its first element in the flat tensor.
        count: number of its elements.
        is_last: whether it completes the tensor.
    """

    file: Path
    name: str
    offset: int
    dtype: torch.dtype
    start: int
    count: int
    is_last: bool

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return self.count * self.dtype.itemsize

    def read(self, buffer: Tensor) -> Tensor:
        """Read into the start of a uint8 buffer (bytes,); return that part as (count,) in the stored dtype.

        Raises:
            CheckpointError: the file cannot be read or ends early.
        """
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
        return buffer[: self.nbytes].view(self.dtype)


def file_order(checkpoint: Checkpoint, names: Iterable[str]) -> list[str]:
    """Return tensor names in the order of their bytes on disk, file by file."""
    return sorted(names, key=lambda name: (checkpoint.file(name), checkpoint.entry(name).start))


def map_bands(
    checkpoint: Checkpoint,
    names: Iterable[str],
    work: Callable[[Band, Tensor], object],
    band_bytes: int = BAND_BYTES,
) -> Iterator[Band]:
    """Call work(band, values) in another thread for every band of the named tensors; yield each band when it is done.

    Bands are yielded in the order of their bytes on disk. `work` may run for two bands at a time, in any order; its
    values, (count,) in the stored dtype, are overwritten once it has returned.

    Raises:
        CheckpointError: naming file and tensor: a file cannot be read, or changed since the checkpoint was opened.
            Whatever `work` raises is raised too.
    """
    bands = list(_bands(checkpoint, names, band_bytes))
    buffers: SimpleQueue[Tensor] = SimpleQueue()
    for _ in range(_WORKERS):
        buffers.put(torch.empty(max((band.nbytes for band in bands), default=0), dtype=torch.uint8))
    reading = Lock()

    def run(band: Band) -> None:
        buffer = buffers.get()
        try:
            with reading:  # one at a time: disks are fastest in sequence
                values = band.read(buffer)
            with kernels.one_thread():  # otherwise the threads of each worker's kernels would spin between bands
                work(band, values)
        finally:
            buffers.put(buffer)

    ahead: deque[tuple[Band, Future[None]]] = deque()
    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="map_bands") as pool:
        try:
            for band in bands:
                ahead.append((band, pool.submit(copy_context().run, run, band)))  # with the kernels' chosen backend
                if len(ahead) > _AHEAD:
                    yield _finished(ahead)
            while ahead:
                yield _finished(ahead)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


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
        checkpoint: where the tensors are, of any shape.
        formats: tensor name -> how to quantize it, or None.
        dtype: of the tensors that are not quantized; None: as stored.
        device: where all tensors go, and where bands are quantized.
        band_bytes: bytes to read at a time.
        progress: called with the bytes of every band that is done.

    Raises:
        CheckpointError: as `map_bands`, or a tensor cannot be quantized: it has another dtype, or holds inf or nan.
    """
    targets: dict[str, _Dense | _Quantized] = {}
    creating = Lock()
    for name, form in formats.items():
        if form is not None and checkpoint.dtype(name) not in SOURCE_DTYPES:
            raise _tensor_error(checkpoint, name, f"cannot quantize a tensor of {checkpoint.dtype(name)}")

    def add(band: Band, values: Tensor) -> None:
        with creating:
            if band.name not in targets:
                form, shape = formats[band.name], torch.Size(checkpoint.shape(band.name))
                targets[band.name] = (
                    _Dense(shape, dtype or band.dtype, device)
                    if form is None
                    else _Quantized(shape, band.dtype, form, device)
                )
        targets[band.name].add(band.start, values)

    for band in map_bands(checkpoint, formats, add, band_bytes):
        if progress is not None:
            progress(band.nbytes)
        if band.is_last:
            try:
                result = targets.pop(band.name).finish()
            except ShapeError as error:
                raise _tensor_error(checkpoint, band.name, str(error)) from None
            yield band.name, result


class _Dense:
    """A tensor that is copied as it is, or to another dtype."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: str | torch.device) -> None:
        self.result = torch.empty(shape, dtype=dtype, device=device)

    def add(self, start: int, values: Tensor) -> None:
        self.result.view(-1)[start : start + len(values)].copy_(values)

    def finish(self) -> Tensor:
        return self.result


class _Quantized:
    """A weight whose codes and scales are filled in band by band: blocks do not depend on each other."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, form: WeightFormat, device: str | torch.device) -> None:
        book, count = codebook(form.quant_type, form.block_size), math.prod(shape)
        self.shape, self.dtype, self.form, self.device = shape, dtype, form, device
        self.boundaries, self.order = book.boundaries.to(device), book.order.to(device)
        self.packed = torch.empty(-(-count // 2), dtype=torch.uint8, device=device)
        self.absmax = torch.empty(-(-count // form.block_size), dtype=torch.float32, device=device)

    def add(self, start: int, values: Tensor) -> None:
        values = values.to(self.device)
        packed, absmax = kernels.quantize_4bit(values, self.boundaries, self.order, self.form.block_size)
        byte, block = start // 2, start // self.form.block_size
        self.packed[byte : byte + len(packed)] = packed
        self.absmax[block : block + len(absmax)] = absmax

    def finish(self) -> QuantizedWeight:
        return assemble(self.packed, self.absmax, self.shape, self.dtype, **asdict(self.form))


def _finished(ahead: deque[tuple[Band, Future[None]]]) -> Band:
    """Wait for the first band of the queue, and remove it."""
    band, future = ahead.popleft()
    future.result()
    return band


def _bands(checkpoint: Checkpoint, names: Iterable[str], band_bytes: int) -> Iterator[Band]:
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
            yield Band(file, name, offset, entry.dtype, start, size, start + size == count)


def _data_origin(checkpoint: Checkpoint, file: Path, names: Iterable[str]) -> int:
    """Return where a file's data part starts, after checking that the file is still the one that was opened."""
    entries = read_header(file)
    for name in names:
        if checkpoint.file(name) == file and entries.get(name) != checkpoint.entry(name):
            raise CheckpointError(f"{file}: tensor {name!r} cannot be read: the file has changed since it was opened")
    with file.open("rb") as handle:
        return 8 + int.from_bytes(handle.read(8), "little")


def _tensor_error(checkpoint: Checkpoint, name: str, message: str) -> CheckpointError:
    return CheckpointError(f"{checkpoint.file(name)}: {name}: {message}")
