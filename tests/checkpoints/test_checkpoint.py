"""Reading checkpoint folders: every dtype, shards, and every way a file can be wrong."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from lorakit.checkpoints.checkpoint import Checkpoint, read_config
from lorakit.checkpoints.safetensors_header import DTYPES, make_header, read_header
from lorakit.errors import CheckpointError

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.tensor([1, 2], dtype=torch.int64)}


def write_raw(folder: Path, header: Any, data: bytes = b"") -> Path:
    """Write model.safetensors from a header of any kind."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write_sharded(folder: Path) -> dict[str, torch.Tensor]:
    shards = {
        "model-00001-of-00002.safetensors": {"a": torch.randn(3, 4), "b": torch.randn(2).half()},
        "model-00002-of-00002.safetensors": {"c": torch.randn(5).bfloat16()},
    }
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    write_index(folder, {tensor: shard for shard, tensors in shards.items() for tensor in tensors})
    return {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# reading


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_every_dtype_reads_back(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = torch.randint(0, 2, (2, 3, dtype.itemsize), dtype=torch.uint8).view(dtype)
    save_file(
        {"x": stored, "empty": torch.empty(0, 4, dtype=dtype), "one": stored[0, 0, 0].clone()},
        tmp_path / "model.safetensors",
    )
    checkpoint = Checkpoint(tmp_path)
    assert sorted(checkpoint.names) == ["empty", "one", "x"]
    assert checkpoint.dtype("x") == dtype and checkpoint.shape("x") == stored.shape
    read = checkpoint.read("x")
    assert read.dtype == dtype and torch.equal(read.view(torch.uint8), stored.view(torch.uint8))
    assert checkpoint.read("empty").shape == (0, 4) and checkpoint.read("one").shape == ()


def test_shards_read_as_one(tmp_path: Path) -> None:
    tensors = write_sharded(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.names == list(tensors) and len(checkpoint) == 3
    assert "a" in checkpoint and "z" not in checkpoint
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor) and checkpoint.dtype(name) == tensor.dtype


def test_a_single_file_wins_over_an_index(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert set(Checkpoint(tmp_path).names) == set(TENSORS)


def test_a_read_tensor_can_be_changed_without_changing_the_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    tensor = Checkpoint(tmp_path).read("a.weight")
    tensor.fill_(7.0)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert torch.equal(Checkpoint(tmp_path).read("a.weight"), TENSORS["a.weight"])


def test_one_tensor_is_read_without_the_rest(tmp_path: Path) -> None:
    """A sparse file of 4 GiB: reading its last 16 bytes must not read what is before them."""
    header = make_header({"big": (torch.uint8, (2**32,)), "small": (torch.uint8, (16,))})
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 2**32 + 16)
    assert torch.equal(Checkpoint(tmp_path).read("small"), torch.zeros(16, dtype=torch.uint8))


def test_the_real_model_has_all_its_tensors(smollm2_folder: Path) -> None:
    checkpoint = Checkpoint(smollm2_folder)
    assert len(checkpoint) == 272
    assert checkpoint.shape("model.embed_tokens.weight") == (49152, 576)
    assert {checkpoint.dtype(name) for name in checkpoint.names} == {torch.bfloat16}
    assert sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names) == 134_515_008
    assert checkpoint.config()["num_hidden_layers"] == 30


# the header we write


@settings(max_examples=50)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 3), max_size=3).map(tuple)),
        max_size=5,
    )
)
def test_a_written_header_reads_back(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    header = make_header(tensors)
    size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        path.write_bytes(header + bytes(size))
        assert {name: (e.dtype, e.shape) for name, e in read_header(path).items()} == tensors
        with safe_open(path, framework="pt") as handle:
            assert set(handle.keys()) == set(tensors) and handle.metadata() == {"format": "pt"}


def test_the_bytes_are_those_safetensors_writes(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": torch.randn(i + 1, 3) for i in range(4)}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    header = make_header({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    ours = header + b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    assert (tmp_path / "theirs").read_bytes() == ours


# what is refused


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"not json", b"", "header is not valid JSON"),
        (b"\xff\xfe{}", b"", "header is not valid JSON"),
        (b"[" * 100_000, b"", "header is not valid JSON"),
        (b"[]", b"", "header is a JSON list"),
        ({"x": 3}, b"", "'x': its header entry must have exactly"),
        ({"x": {**entry(), "extra": 1}}, b"1234", "'x': its header entry must have exactly"),
        ({"x": entry("F33")}, b"1234", "'x': unknown dtype 'F33'; did you mean 'F32'"),
        ({"x": entry(shape=[-1])}, b"1234", "'x': shape"),
        ({"x": entry(shape=[True])}, b"1234", "'x': shape"),
        ({"x": entry(shape=[2**70, 0], offsets=[0, 0])}, b"", "'x': shape"),
        ({"x": entry(shape=[2**40, 2**40, 0], offsets=[0, 0])}, b"", "'x': shape"),
        ({"x": entry(offsets=[4, 0])}, b"1234", "'x': data_offsets"),
        ({"x": entry(offsets=[0])}, b"1234", "'x': data_offsets"),
        ({"x": entry(shape=[2])}, b"1234", "'x': shape [2] of F32 needs 8 bytes, data_offsets give 4"),
        ({"x": entry(offsets=[4, 8])}, b"12345678", "'x' leaves a gap before it: starts at 4, expected 0"),
        ({"x": entry(), "y": entry(offsets=[0, 4])}, b"1234", "'y' overlaps the tensor before it"),
        ({"x": entry()}, b"12345", "bytes follow the last tensor"),
        ({"x": entry()}, b"123", "it is truncated"),
        ({"x": entry(), "__metadata__": {"a": 1}}, b"1234", "__metadata__ must map strings to strings"),
    ],
)
def test_a_malformed_header_is_named(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    path = write_raw(tmp_path, header, data)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(tmp_path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_a_truncated_file_says_by_how_much(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(CheckpointError, match=f"file is {len(whole) - 5} bytes, header promises {len(whole)}"):
        Checkpoint(tmp_path)


def test_a_wild_header_length_is_refused_without_allocating(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}")
    with pytest.raises(CheckpointError, match=f"promise a header of {2**64 - 1} bytes"):
        Checkpoint(tmp_path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_corruption_is_an_error_or_a_correct_read(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever bytes of the header change: a CheckpointError, or tensors on which safetensors itself agrees."""
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    raw = bytearray(path.read_bytes())
    head = len(raw) - sum(tensor.nbytes for tensor in TENSORS.values())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, head - 1))
        # Digits, brackets and quotes more often than chance: they keep the JSON valid and the meaning wrong.
        new = data.draw(st.sampled_from(list(b'0123456789[]{},:"FIBU68\\')) | st.integers(0, 255))
        kind = data.draw(st.sampled_from(["change", "insert", "delete", "cut"]))
        if kind == "change":
            raw[at] = new
        elif kind == "insert":
            raw.insert(at, new)
        elif kind == "delete":
            del raw[at]
        else:
            del raw[data.draw(st.integers(0, len(raw) - 1)) :]
            break
    path.write_bytes(raw)
    try:
        checkpoint = Checkpoint(tmp_path)
        tensors = {name: checkpoint.read(name) for name in checkpoint.names}
    except CheckpointError:
        return
    with safe_open(path, framework="pt") as handle:
        assert set(handle.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert (tensor.dtype, tensor.shape) == (checkpoint.dtype(name), checkpoint.shape(name))
            theirs = handle.get_tensor(name).contiguous()
            assert torch.equal(tensor.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize(
    "shard", ["../up.safetensors", "/etc/passwd", "sub/x", "a\\b", "C:x", "..", ".", "", "a\0b", 3]
)
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, shard: Any) -> None:
    write_index(tmp_path, {"x": shard})
    with pytest.raises(CheckpointError, match=r"tensor 'x': shard .* is not the name of a file"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {}])
def test_an_index_needs_a_weight_map(tmp_path: Path, weight_map: Any) -> None:
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match="'weight_map' must map"):
        Checkpoint(tmp_path)


def test_missing_shards_are_listed(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"not here: model-00002-of-00002\.safetensors"):
        Checkpoint(tmp_path)


def test_a_tensor_absent_from_its_shard_is_named(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "shard.safetensors")
    write_index(tmp_path, {"a.weight": "shard.safetensors", "c": "shard.safetensors"})
    with pytest.raises(CheckpointError, match=r"shard\.safetensors: tensor 'c' is not in this shard"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("file", "advice"),
    [("m.gguf", "convert m.gguf with"), ("pytorch_model.bin", "is a pickle"), ("notes.txt", "has no")],
)
def test_a_folder_without_weights_gets_advice(tmp_path: Path, file: str, advice: str) -> None:
    (tmp_path / file).touch()
    with pytest.raises(CheckpointError, match=advice):
        Checkpoint(tmp_path)


def test_an_unknown_tensor_gets_the_nearest_name(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor 'a\.wieght'; did you mean 'a\.weight'"):
        Checkpoint(tmp_path).read("a.wieght")


def test_a_file_replaced_after_opening_is_an_error(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor 'a\.weight' cannot be read"):
        checkpoint.read("a.weight")


def test_config_errors_say_where(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        read_config(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"there is no config\.json here"):
        read_config(tmp_path)
    config = tmp_path / "config.json"
    with pytest.raises(CheckpointError, match="is a file, expected a checkpoint folder"):
        config.write_text("{}")
        read_config(config)
    config.write_text('{\n "a": 1,\n}')
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON: .*line [23]"):
        read_config(tmp_path)
    config.write_text("[1]")
    with pytest.raises(CheckpointError, match="holds a JSON list, expected an object"):
        read_config(tmp_path)
    config.write_text('{"a": 1}')
    assert read_config(tmp_path) == {"a": 1}
