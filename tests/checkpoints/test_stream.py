"""Streaming: every byte arrives, in bands, one ahead; what is quantized on the way equals the quantized whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorakit import QuantizedWeight, quantize
from lorakit.checkpoints.safetensors_header import DTYPES
from lorakit.checkpoints.stream import Band, file_order, map_bands, stream_tensors
from lorakit.errors import CheckpointError
from lorakit.models import Checkpoint
from lorakit.quantization.policy import WeightFormat

BANDS = [1, 50_000, 1 << 20]  # the smallest is one whole block of the largest block size, 4096 elements


def write(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> Checkpoint:
    files = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return Checkpoint(folder)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("band_bytes", BANDS)
def test_every_dtype_and_shape_arrives(tmp_path: Path, band_bytes: int) -> None:
    tensors = {}
    for name, dtype in DTYPES.items():
        values = torch.randint(0, 2, (3, 5_000, dtype.itemsize), dtype=torch.uint8).view(dtype).squeeze(-1)
        tensors |= {name: values, f"{name}.empty": values[:0].clone(), f"{name}.one": values[0, 0].clone()}
    checkpoint = write(tmp_path, tensors, shards=2)
    read = dict(stream_tensors(checkpoint, dict.fromkeys(tensors), band_bytes=band_bytes))
    assert list(read) == file_order(checkpoint, tensors)
    assert {name: bits(tensor) for name, tensor in read.items()} == {name: bits(t) for name, t in tensors.items()}


def test_only_what_is_named_and_in_the_dtype_asked_for(tmp_path: Path) -> None:
    tensors = {name: random(100, seed=i) for i, name in enumerate("abc")}
    checkpoint = write(tmp_path, tensors)
    read = dict(stream_tensors(checkpoint, {"c": None, "a": None}, torch.float32))
    assert {name: bits(tensor) for name, tensor in read.items()} == {n: bits(tensors[n].float()) for n in "ac"}
    assert list(stream_tensors(checkpoint, {})) == []


@pytest.mark.parametrize("band_bytes", BANDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [WeightFormat("nf4", 64, True), WeightFormat("fp4", 4096, False)])
def test_quantized_on_the_way_is_the_quantized_whole(
    tmp_path: Path, band_bytes: int, dtype: torch.dtype, form: WeightFormat
) -> None:
    shapes = {"even": (150, 128), "odd": (333, 77), "experts": (3, 70, 64), "flat": (9001,), "small": (2, 3)}
    tensors = {name: random(*shape, dtype=dtype) for name, shape in shapes.items()}
    checkpoint = write(tmp_path, tensors)
    for name, read in stream_tensors(checkpoint, dict.fromkeys(tensors, form), band_bytes=band_bytes):
        whole = quantize(tensors[name], form.quant_type, form.block_size, form.double_quant)
        assert isinstance(read, QuantizedWeight) and read.double_quant == form.double_quant
        assert (read.shape, read.dtype, read.block_size) == (whole.shape, whole.dtype, whole.block_size)
        assert bits(read.packed) == bits(whole.packed) and bits(read.absmax) == bits(whole.absmax)


def test_bands_come_in_order_from_two_buffers(tmp_path: Path) -> None:
    tensors = {"a": random(40_000), "b": random(10_000, dtype=torch.float32)}
    checkpoint = write(tmp_path, tensors)
    seen: dict[tuple[str, int], Tensor] = {}
    buffers = set()

    def work(band: Band, values: Tensor) -> None:
        buffers.add(values.data_ptr())
        seen[band.name, band.start] = values.clone()

    bands = list(map_bands(checkpoint, ["b", "a"], work, band_bytes=16_384))
    assert [(band.name, band.start, band.count, band.is_last) for band in bands] == [
        *[("b", 0, 4096, False), ("b", 4096, 4096, False), ("b", 8192, 1808, True)],
        *[("a", i * 8192, 8192, False) for i in range(4)],
        ("a", 32_768, 7232, True),
    ]
    for name, tensor in tensors.items():
        assert torch.equal(torch.cat([seen[band.name, band.start] for band in bands if band.name == name]), tensor)
    assert len(buffers) <= 2


def test_one_reads_while_the_other_works(tmp_path: Path) -> None:
    """Two calls of `work` wait for each other: both go on only if they are under way at the same time."""
    checkpoint = write(tmp_path, {"a": random(8192 * 14)})
    meeting = threading.Barrier(2, timeout=20)
    bands = list(map_bands(checkpoint, ["a"], lambda band, values: meeting.wait(), band_bytes=8192 * 2))
    assert len(bands) == 14


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, {"a": random(100, 100), "b": random(7), "c": random(0)})
    seen: list[int] = []
    forms = {"a": WeightFormat(), "b": None, "c": None}
    list(stream_tensors(checkpoint, forms, band_bytes=8192, progress=seen.append))
    assert sum(seen) == 2 * 10_007 and max(seen) == 8192


def test_nothing_runs_on_after_an_early_end(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, {"a": random(100_000)})
    done = []
    bands = map_bands(checkpoint, ["a"], lambda band, values: done.append(band), band_bytes=8192)
    first = next(bands)
    assert any("map_bands" in thread.name for thread in threading.enumerate())
    bands.close()
    assert not any("map_bands" in thread.name for thread in threading.enumerate())
    assert first in done and len(done) < 15  # of 25


def test_an_error_in_the_work_ends_it(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, {"a": random(100_000)})
    done = []

    def work(band: Band, values: Tensor) -> None:
        done.append(band)
        if band.start:
            raise KeyError(band.start)

    with pytest.raises(KeyError, match="4096"):
        list(map_bands(checkpoint, ["a"], work, band_bytes=8192))
    assert len(done) < 15
    assert not any("map_bands" in thread.name for thread in threading.enumerate())


class TestFaults:
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_a_value_that_is_not_finite(self, value: float, tmp_path: Path) -> None:
        bad = random(64, 300)
        bad[40, 7] = value  # element 12007
        checkpoint = write(tmp_path, {"good": random(4, 4), "layer.bad": bad})
        with pytest.raises(CheckpointError) as caught:
            list(stream_tensors(checkpoint, dict.fromkeys(checkpoint.names, WeightFormat()), band_bytes=1))
        assert f"{tmp_path / 'model-0.safetensors'}: layer.bad: cannot quantize" in str(caught.value)
        assert "elements 11968 to 12031" in str(caught.value)

    def test_a_dtype_that_cannot_be_quantized_is_refused_before_reading(self, tmp_path: Path) -> None:
        checkpoint = write(tmp_path, {"a": random(8), "w": torch.zeros(8, dtype=torch.float64)})
        seen: list[int] = []
        with pytest.raises(CheckpointError, match=r"w: cannot quantize a tensor of torch\.float64"):
            list(stream_tensors(checkpoint, {"a": None, "w": WeightFormat()}, progress=seen.append))
        assert not seen

    def test_an_unknown_name(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"no tensor 'wieght'; did you mean 'weight'"):
            list(stream_tensors(write(tmp_path, {"weight": random(8)}), {"wieght": None}))

    def test_a_file_replaced_after_opening(self, tmp_path: Path) -> None:
        checkpoint = write(tmp_path, {"a": random(8), "b": random(9)})
        write(tmp_path, {"a": random(8), "b": random(10)})
        with pytest.raises(CheckpointError, match=r"model-0\.safetensors: tensor 'b' cannot be read: the file has ch"):
            list(stream_tensors(checkpoint, {"a": None, "b": None}))

    def test_a_file_that_shrinks_while_it_is_read(self, tmp_path: Path) -> None:
        checkpoint = write(tmp_path, {"a": random(100_000), "b": random(8)})
        bands = map_bands(checkpoint, ["a", "b"], lambda band, values: None, band_bytes=8192)
        next(bands)
        (tmp_path / "model-0.safetensors").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"model-0\.safetensors: tensor 'a' .* the file has become shorter"):
            list(bands)

    def test_a_file_that_vanishes(self, tmp_path: Path) -> None:
        checkpoint = write(tmp_path, {"a": random(8)})
        (tmp_path / "model-0.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"model-0\.safetensors"):
            list(stream_tensors(checkpoint, {"a": None}))


MEASURE = """
import sys, torch
from lorakit import quantize
from lorakit.measure import peak_rss_mb
from lorakit.models import Checkpoint
from lorakit.checkpoints.stream import stream_tensors
from lorakit.quantization.policy import WeightFormat
checkpoint = Checkpoint(sys.argv[1])
quantize(torch.randn(1024, 1024))  # the code paths themselves take memory, once
before = peak_rss_mb()
(_, weight), = stream_tensors(checkpoint, {"w": WeightFormat()}, band_bytes=4 << 20)
print(peak_rss_mb() - before, weight.nbytes / 2**20)
"""


def test_memory_is_two_bands_besides_the_result(tmp_path: Path) -> None:
    """A tensor of 256 MiB becomes 66 MiB of codes and scales."""
    checkpoint = write(tmp_path, {"w": random(1 << 20).repeat(128).view(-1, 4096)})
    assert checkpoint.entry("w").end == 1 << 28
    # The bound is that of the CPU's kernels: their definition in plain PyTorch, which may be chosen, needs more.
    environment = {key: value for key, value in os.environ.items() if key != "LORAKIT_BACKEND"}
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    peak, result = map(float, output.split())
    # Two bands; 8 MiB of fp32 scales before they are nested, three times at most, once in fp64; and the slack of
    # the allocator, which keeps memory for each thread.
    assert peak < result + 2 * 4 + 32 + 20
