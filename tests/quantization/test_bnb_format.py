"""bitsandbytes' tensors: what is written is read back to the bit, and nothing malformed is read at all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakit import QuantizedWeight, quantize
from lorakit.errors import CheckpointError, ShapeError
from lorakit.quantization import BLOCK_SIZES, QUANT_TYPES, STORAGE_DTYPES, NestedScales, bnb_format
from lorakit.quantization.bnb_format import QuantState, from_tensors, group_parts, read_state, to_tensors

STATE = "quant_state.bitsandbytes__nf4"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def example(double_quant: bool = True, shape: tuple[int, ...] = (6, 50), block_size: int = 32) -> QuantizedWeight:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    return quantize(weight, block_size=block_size, double_quant=double_quant)


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_same(a: QuantizedWeight, b: QuantizedWeight) -> None:
    assert (a.shape, a.dtype, a.quant_type, a.block_size) == (b.shape, b.dtype, b.quant_type, b.block_size)
    assert bits(a.packed) == bits(b.packed) and bits(a.code_values) == bits(b.code_values)
    assert bits(a.absmax) == bits(b.absmax) and a.double_quant == b.double_quant
    if isinstance(a.scales, NestedScales):
        for part in ("codes", "absmax", "offset", "code_values"):
            assert bits(getattr(a.scales, part)) == bits(getattr(b.scales, part))
        assert a.scales.block_size == b.scales.block_size


# round trips


@settings(max_examples=200, deadline=None)
@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    dtype=st.sampled_from(FLOATS),
    quant_type=st.sampled_from(list(QUANT_TYPES)),
    block_size=st.sampled_from(BLOCK_SIZES),
    double_quant=st.booleans(),
    storage=st.sampled_from(STORAGE_DTYPES),
    seed=st.integers(0, 2**32),
)
def test_what_is_written_is_read_back(
    shape: list[int], dtype: torch.dtype, quant_type: str, block_size: int, double_quant: bool,
    storage: torch.dtype, seed: int,
) -> None:  # fmt: skip
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    quantized = quantize(weight, quant_type, block_size, double_quant)
    if quantized.packed.numel() % storage.itemsize:
        with pytest.raises(ShapeError, match="do not divide"):
            to_tensors(quantized, storage)
        return
    tensors = to_tensors(quantized, storage)
    assert tensors[""].dtype == storage and tensors[""].shape == (quantized.packed.numel() // storage.itemsize, 1)
    assert {s: (t.dtype, tuple(t.shape)) for s, t in tensors.items()} == QuantState.of(quantized).layouts(storage)
    assert_same(from_tensors("w", tensors), quantized)


@pytest.mark.parametrize("double_quant", [True, False])
def test_through_a_file(double_quant: bool, tmp_path: Path) -> None:
    weight = example(double_quant)
    save_file({bnb_format.joined("a.weight", s): t for s, t in to_tensors(weight).items()}, tmp_path / "x.safetensors")
    stored = load_file(tmp_path / "x.safetensors")
    groups = group_parts(["b", *stored, "absmaxi", "c.quant_state"])
    assert list(groups) == ["a.weight"]
    tensors = {suffix: stored[bnb_format.joined("a.weight", suffix)] for suffix in ["", *groups["a.weight"]]}
    assert len(tensors) == len(stored)
    assert_same(from_tensors("a.weight", tensors), weight)


def test_the_json_is_that_of_bitsandbytes() -> None:
    shape = torch.Size([2048, 2048])
    nested = QuantState("nf4", 64, torch.bfloat16, shape, 256, 0.051955871284008026)
    plain = b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2048, 2048]'
    extra = b', "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.051955871284008026}'
    assert nested.to_json() == plain + extra
    assert QuantState("nf4", 64, torch.bfloat16, shape).to_json() == plain + b"}"


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_the_offset_is_exact(offset: float) -> None:
    state = QuantState("nf4", 64, torch.float32, torch.Size([4]), 256, offset)
    read = QuantState.parse(state.to_json(), "x").nested_offset
    assert read is not None and math.copysign(1, read) == math.copysign(1, offset)
    assert torch.tensor(read, dtype=torch.float32).item() == offset


# what others may have written


def test_the_stored_tables_are_used() -> None:
    tensors = to_tensors(example())
    tensors["quant_map"] = torch.arange(16.0)
    tensors["nested_quant_map"] = torch.zeros(256)
    weight = from_tensors("w", tensors)
    assert isinstance(weight.scales, NestedScales)
    assert torch.equal(weight.absmax, weight.scales.offset.expand_as(weight.absmax))
    values = weight.codes.float() * weight.scales.offset
    assert torch.equal(weight.dequantize(torch.float32), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_in_half_precision_are_widened(dtype: torch.dtype) -> None:
    plain, nested = to_tensors(example(double_quant=False)), to_tensors(example())
    plain["absmax"] = plain["absmax"].to(dtype)
    nested["nested_absmax"] = nested["nested_absmax"].to(dtype)
    assert bits(from_tensors("w", plain).absmax) == bits(plain["absmax"].float())
    scales = from_tensors("w", nested).scales
    assert isinstance(scales, NestedScales) and bits(scales.absmax) == bits(nested["nested_absmax"].float())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(-1,), (1, -1)])
def test_packed_bytes_of_any_form(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = example(shape=(8, 50))
    tensors = to_tensors(weight)
    tensors[""] = tensors[""].view(-1).view(dtype).view(shape)
    assert_same(from_tensors("w", tensors), weight)


# what is refused

Change = Callable[[dict[str, Tensor]], object]


def replace(suffix: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors.update({suffix: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(""), "'m.w' is missing"),
        (lambda t: t.pop("absmax"), "'m.w.absmax' is missing"),
        (lambda t: t.pop("quant_map"), "'m.w.quant_map' is missing"),
        (lambda t: t.pop("nested_absmax"), "'m.w.nested_absmax' is missing"),
        (lambda t: t.pop("nested_quant_map"), "'m.w.nested_quant_map' is missing"),
        (lambda t: t.pop(STATE), f"'m.w.{STATE}' is missing"),
        (lambda t: t.update({STATE[:-3] + "nf5": t.pop(STATE)}), "bitsandbytes__nf5' is of an unknown type; did you"),
        (lambda t: t.update({STATE[:-3] + "fp4": t.pop(STATE)}), "fp4': quant_type is 'nf4', unlike its name"),
        (lambda t: t.update({STATE[:-3] + "fp4": t[STATE]}), "fp4' is a second quant_state of the same weight"),
        (replace(STATE, torch.zeros(9)), "has dtype float32 and shape (9,), expected up to 65536 uint8"),
        (replace(STATE, torch.zeros(3, 3, dtype=torch.uint8)), "has dtype uint8 and shape (3, 3)"),
        (replace(STATE, torch.zeros(1 << 17, dtype=torch.uint8)), "and shape (131072,)"),
        (replace("", torch.zeros(150, 1, dtype=torch.int64)), "'m.w' has dtype int64, expected one of bfloat16, "),
        (replace("", torch.zeros(149, 1, dtype=torch.uint8)), "'m.w' has 149 packed bytes, expected 150"),
        (replace("absmax", torch.zeros(9, dtype=torch.uint8)), "absmax' is uint8 [9], expected uint8 [10]"),
        (replace("absmax", torch.zeros(10)), "absmax' is float32 [10], expected uint8 [10]"),
        (replace("absmax", torch.zeros(2, 5, dtype=torch.uint8)), "absmax' is uint8 [2, 5], expected uint8 [10]"),
        (replace("quant_map", torch.zeros(15)), "quant_map' is float32 [15], expected float32 [16]"),
        (replace("quant_map", torch.full((16,), torch.nan)), "'m.w.quant_map' holds inf or nan"),
        (replace("nested_absmax", torch.zeros(2)), "nested_absmax' is float32 [2], expected float32 [1]"),
        (replace("nested_absmax", torch.tensor([torch.inf])), "'m.w.nested_absmax' holds inf or nan"),
        (replace("nested_quant_map", torch.zeros(256).double()), "is float64 [256], expected float32 [256]"),
    ],
)
def test_malformed_tensors_are_named(change: Change, message: str) -> None:
    tensors = to_tensors(example())
    change(tensors)
    with pytest.raises(CheckpointError) as caught:
        from_tensors("m.w", tensors)
    assert message in str(caught.value)


def test_nested_scales_do_not_belong_to_a_plain_weight() -> None:
    tensors = to_tensors(example(double_quant=False)) | {"nested_absmax": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"'w\.nested_absmax' does not belong to a nf4 weight with plain scales"):
        from_tensors("w", tensors)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 50_000, "not valid JSON"),
        (b"9" * 5_000, "not valid JSON"),
        (b"[]", "holds a JSON list, expected an object"),
        ({"dtype": None, "shape": None}, "lacks dtype, shape"),
        ({"nested_offset": None}, "lacks nested_offset"),
        ({"block_size": 64}, "has the unknown key 'block_size'; did you mean 'blocksize'?"),
        ({"quant_type": "int4"}, "quant_type is 'int4', expected one of nf4, fp4"),
        ({"quant_type": 4}, "quant_type is 4, expected"),
        ({"blocksize": 48}, "blocksize is 48, expected one of 32, 64"),
        ({"blocksize": 64.0}, "blocksize is 64.0, expected"),
        ({"blocksize": "64"}, "blocksize is '64', expected"),
        ({"dtype": "float64"}, "dtype is 'float64', expected one of float32, bfloat16, float16"),
        ({"dtype": ["float32"]}, "dtype is ['float32'], expected"),
        ({"shape": 4}, "shape 4 is not a list of sizes"),
        ({"shape": [4, -1]}, "shape [4, -1] is not a list of sizes"),
        ({"shape": [True, 4]}, "shape [True, 4] is not a list of sizes"),
        ({"shape": [2.0]}, "shape [2.0] is not a list of sizes"),
        ({"shape": [2**40, 2**40]}, "has too many elements"),
        ({"shape": [2**40, 2**40, 0]}, "has too many elements"),
        ({"shape": list(range(1000))}, "... has too many elements"),
        ({"nested_dtype": "float16"}, "nested_dtype is 'float16', expected float32"),
        ({"nested_blocksize": 0}, "nested_blocksize is 0, expected 256"),
        ({"nested_offset": "0.1"}, "nested_offset '0.1' is not a number that fp32 can hold"),
        ({"nested_offset": True}, "nested_offset True is not a number"),
        ({"nested_offset": math.nan}, "nested_offset nan is not a number"),
        ({"nested_offset": -math.inf}, "nested_offset -inf is not a number"),
        ({"nested_offset": 1e39}, "nested_offset 1e+39 is not a number"),
        ({"nested_offset": 10**400}, "is not a number that fp32 can hold"),
    ],
)
def test_malformed_states_are_named(raw: bytes | dict[str, Any], message: str) -> None:
    if isinstance(raw, dict):
        values = json.loads(QuantState.of(example()).to_json()) | raw
        raw = json.dumps({key: value for key, value in values.items() if value is not None}).encode()
    with pytest.raises(CheckpointError) as caught:
        QuantState.parse(raw, "m.w.state")
    assert "tensor 'm.w.state'" in str(caught.value) and message in str(caught.value)
    assert len(str(caught.value)) < 250


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_any_corruption_of_the_state_is_an_error_or_a_weight_of_its_size(data: st.DataObject) -> None:
    """Whatever bytes of the JSON change: a CheckpointError, or a weight whose tensors fit what the JSON says."""
    tensors = to_tensors(example())
    raw = bytearray(tensors[STATE].numpy().tobytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        new = data.draw(st.sampled_from(list(b'0123456789[]{},:"-.eE \\nftbl')) | st.integers(0, 255))
        kind = data.draw(st.sampled_from(["change", "insert", "delete"]))
        if kind == "change":
            raw[at] = new
        elif kind == "insert":
            raw.insert(at, new)
        else:
            del raw[at]
    tensors[STATE] = torch.tensor(list(raw), dtype=torch.uint8)
    try:
        weight = from_tensors("w", tensors)
    except CheckpointError:
        return
    assert read_state("w", STATE, tensors[STATE]) == QuantState.of(weight)
    assert weight.dequantize(torch.float32).shape == weight.shape
