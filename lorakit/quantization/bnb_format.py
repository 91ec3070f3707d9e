"""bitsandbytes' file format: the tensors that represent one 4-bit weight in a safetensors file.

    <weight>                                     the packed bytes, (bytes / itemsize, 1), in any storage dtype
    <weight>.absmax                              (blocks,): fp32 scales, or with double quantization their uint8 codes
    <weight>.quant_map                           (16,) fp32: the codebook
    <weight>.nested_absmax                       (ceil(blocks / 256),) fp32     } with double
    <weight>.nested_quant_map                    (256,) fp32: the dynamic map   } quantization
    <weight>.quant_state.bitsandbytes__nf4       uint8: JSON in UTF-8, the rest (`QuantState`); or ..__fp4

Reading trusts nothing. `QuantState.check` checks names, dtypes and sizes against each other from the file's header
alone, so that a malformed file is refused before its tensors are read. Weights use the codebooks of the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, did_you_mean
from .codebooks import QUANT_TYPES
from .scales import NESTED_BLOCK_SIZE, NestedScales
from .weight import BLOCK_SIZES, QuantizedWeight

STATE_PREFIX = "quant_state.bitsandbytes__"
MAX_STATE_BYTES = 1 << 16  # a real one has about 180

Layout = tuple[torch.dtype, tuple[int, ...]]

_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FLOATS = frozenset(_DTYPES.values())
_STORAGE = _FLOATS | {torch.uint8, torch.int8, torch.float64}
_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_KEYS = {"nested_blocksize", "nested_dtype", "nested_offset"}


@dataclass(frozen=True)
class QuantState:
    """The description of a weight that the JSON holds.

    Attributes:
        quant_type: a name in `QUANT_TYPES`, such as "nf4".
        block_size: elements that share a scale.
        dtype, shape: dtype and shape of the original weight.
        nested_block_size: scales that share a nested scale; None without double quantization.
        nested_offset: the mean of the scales, exact as fp32; None without double quantization.
    """

    quant_type: str
    block_size: int
    dtype: torch.dtype
    shape: torch.Size
    nested_block_size: int | None = None
    nested_offset: float | None = None

    @staticmethod
    def of(weight: QuantizedWeight) -> QuantState:
        """Return the state of a weight in memory."""
        nested = weight.scales if isinstance(weight.scales, NestedScales) else None
        return QuantState(
            weight.quant_type, weight.block_size, weight.dtype, weight.shape,
            nested.block_size if nested else None, nested.offset.item() if nested else None,
        )  # fmt: skip

    @staticmethod
    def parse(raw: bytes, name: str) -> QuantState:
        """Read the JSON. Errors call its tensor `name`.

        Raises:
            CheckpointError: it is not JSON, a key is missing or unknown, or a value is invalid.
        """
        try:
            values = json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"tensor {name!r}: not valid JSON: {error}") from None
        try:
            return _state(values)
        except _Invalid as error:
            raise CheckpointError(f"tensor {name!r}: {error}") from None

    def to_json(self) -> bytes:
        """Return the JSON as bitsandbytes writes it."""
        values: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.block_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        if self.nested_block_size is not None:
            values |= {"nested_blocksize": self.nested_block_size, "nested_dtype": "float32"}
            values["nested_offset"] = self.nested_offset  # a double that holds an fp32: printed and read back exactly
        return json.dumps(values).encode()

    def layouts(self, storage_dtype: torch.dtype = torch.uint8) -> dict[str, Layout]:
        """Return suffix -> (dtype, shape) of the tensors in a file; the suffix of the packed bytes is ""."""
        count, nested = math.prod(self.shape), self.nested_block_size
        blocks = -(-count // self.block_size)
        layouts: dict[str, Layout] = {
            "": (storage_dtype, (-(-count // 2) // storage_dtype.itemsize, 1)),
            "absmax": (torch.uint8 if nested else torch.float32, (blocks,)),
            "quant_map": (torch.float32, (16,)),
        }
        if nested:
            layouts |= {"nested_absmax": (torch.float32, (-(-blocks // nested),))}
            layouts |= {"nested_quant_map": (torch.float32, (256,))}
        return layouts | {STATE_PREFIX + self.quant_type: (torch.uint8, (len(self.to_json()),))}

    def check(self, name: str, layouts: Mapping[str, Layout]) -> None:
        """Check a weight's tensors against this state. The tensors need not have been read.

        Any float dtype may replace another, and the packed bytes may have any storage dtype.

        Args:
            name: name of the weight.
            layouts: suffix -> (dtype, shape) of its tensors.

        Raises:
            CheckpointError: a tensor, which the message names, is missing, unexpected, or of a wrong dtype or size.
        """
        expected = self.layouts()
        for suffix in [*expected, *layouts]:
            full = joined(name, suffix)
            if suffix not in layouts:
                raise CheckpointError(f"tensor {full!r} is missing")
            if suffix not in expected:
                scales = "double quantization" if self.nested_block_size else "plain scales"
                raise CheckpointError(f"tensor {full!r} does not belong to a {self.quant_type} weight with {scales}")
            if suffix == "":
                _check_packed(full, layouts[suffix], expected[suffix])
            elif not suffix.startswith(STATE_PREFIX):  # this state itself
                _check_vector(full, layouts[suffix], expected[suffix])


def group_parts(names: Iterable[str]) -> dict[str, list[str]]:
    """Find the 4-bit weights among tensor names: weight -> the suffixes of its tensors."""
    found: dict[str, list[str]] = {}
    for name in names:
        head, mark, kind = name.rpartition(f".{STATE_PREFIX}")
        weight, _, suffix = (head, "", STATE_PREFIX + kind) if mark else name.rpartition(".")
        if mark or suffix in _PARTS:
            found.setdefault(weight, []).append(suffix)
    return found


def state_suffix(name: str, suffixes: Iterable[str]) -> str:
    """Return the suffix, among those of a weight, that names its state.

    Raises:
        CheckpointError: there is none, there are several, or the type is unknown.
    """
    known = [STATE_PREFIX + quant_type for quant_type in QUANT_TYPES]
    states = [suffix for suffix in suffixes if suffix.startswith(STATE_PREFIX)]
    if not states:
        raise CheckpointError(f"tensor {joined(name, known[0])!r} is missing, and there is none of another type")
    if len(states) > 1:
        raise CheckpointError(f"tensor {joined(name, states[1])!r} is a second quant_state of the same weight")
    if states[0] not in known:
        near = did_you_mean(states[0], known)
        raise CheckpointError(f"tensor {joined(name, states[0])!r} is of an unknown type{near}")
    return states[0]


def check_state_layout(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise CheckpointError unless a tensor can hold the JSON of a state. The tensor need not have been read."""
    if dtype != torch.uint8 or len(shape) != 1 or shape[0] > MAX_STATE_BYTES:
        raise CheckpointError(
            f"tensor {name!r} has dtype {_plain(dtype)} and shape {shape}, expected up to {MAX_STATE_BYTES} uint8"
        )


def read_state(name: str, suffix: str, tensor: Tensor) -> QuantState:
    """Return the state that a weight's tensor holds: (bytes,) uint8, JSON in UTF-8.

    Args:
        name: name of the weight.
        suffix: suffix of the tensor.
        tensor: the tensor.

    Raises:
        CheckpointError: as `QuantState.parse`, or the type differs from that in the tensor's name.
    """
    state = QuantState.parse(tensor.cpu().numpy().tobytes(), joined(name, suffix))
    if STATE_PREFIX + state.quant_type != suffix:
        raise CheckpointError(f"tensor {joined(name, suffix)!r}: quant_type is '{state.quant_type}', unlike its name")
    return state


def from_tensors(name: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """Return a weight from its tensors.

    Args:
        name: name of the weight.
        tensors: suffix -> tensor, with the shapes and dtypes at the top of this file, all on one device. The suffix of
            the packed bytes is "". The weight shares their memory where possible.

    Raises:
        CheckpointError: a tensor, which the message names, is missing, malformed, of a wrong dtype or size, or holds
            inf or nan.
    """
    key = state_suffix(name, tensors)
    check_state_layout(joined(name, key), tensors[key].dtype, tuple(tensors[key].shape))
    state = read_state(name, key, tensors[key])
    state.check(name, {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in tensors.items()})
    for suffix, tensor in tensors.items():
        if suffix and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"tensor {joined(name, suffix)!r} holds inf or nan")
    packed = tensors[""].contiguous().view(-1).view(torch.uint8)
    if len(state.shape) > 1 and state.shape[-1] % 2 == 0:
        packed = packed.view(*state.shape[:-1], state.shape[-1] // 2)
    absmax, scales = tensors["absmax"], None
    if state.nested_block_size is not None:
        offset = torch.tensor(state.nested_offset, dtype=torch.float32, device=packed.device)
        nested, table = tensors["nested_absmax"].float(), tensors["nested_quant_map"].float()
        scales = NestedScales(absmax, nested, offset, table, state.nested_block_size)
    code_values = tensors["quant_map"].float()
    return QuantizedWeight(
        packed, scales or absmax.float(), state.shape, state.dtype, state.quant_type, state.block_size, code_values
    )


def to_tensors(weight: QuantizedWeight, storage_dtype: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """Return a weight's tensors, suffix -> tensor, as bitsandbytes would save them.

    Shapes and dtypes are those at the top of this file. The suffix of the packed bytes, of shape
    (bytes / itemsize, 1), is "".

    Raises:
        ShapeError: the packed bytes do not divide into elements of the storage dtype.
    """
    state = QuantState.of(weight)
    nested = weight.scales if isinstance(weight.scales, NestedScales) else None
    tensors = {"": weight.stored(storage_dtype).view(-1, 1), "quant_map": weight.code_values}
    tensors["absmax"] = nested.codes if nested else weight.absmax
    if nested:
        tensors |= {"nested_absmax": nested.absmax, "nested_quant_map": nested.code_values}
    tensors[STATE_PREFIX + weight.quant_type] = torch.tensor(list(state.to_json()), dtype=torch.uint8)
    return tensors


def joined(name: str, suffix: str) -> str:
    """Return the full name of a weight's tensor."""
    return f"{name}.{suffix}" if suffix else name


class _Invalid(Exception):
    """A value in the JSON is invalid."""


def _state(values: Any) -> QuantState:
    if not isinstance(values, dict):
        raise _Invalid(f"holds a JSON {type(values).__name__}, expected an object")
    expected = _KEYS | _NESTED_KEYS if _NESTED_KEYS & values.keys() else _KEYS
    if missing := expected - values.keys():
        raise _Invalid(f"lacks {', '.join(sorted(missing))}")
    if unknown := values.keys() - expected:
        raise _Invalid(f"has the unknown key {min(unknown)!r}{did_you_mean(min(unknown), _KEYS | _NESTED_KEYS)}")
    quant_type = _one_of("quant_type", values, list(QUANT_TYPES))
    block_size = _one_of("blocksize", values, list(BLOCK_SIZES))
    dtype = _DTYPES[_one_of("dtype", values, list(_DTYPES))]
    shape = values["shape"]
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise _Invalid(f"shape {_short(shape)} is not a list of sizes")
    if math.prod(size or 1 for size in shape) >= 2**63:
        raise _Invalid(f"shape {_short(shape)} has too many elements")
    if expected == _KEYS:
        return QuantState(quant_type, block_size, dtype, torch.Size(shape))
    _one_of("nested_dtype", values, ["float32"])
    nested_block_size = _one_of("nested_blocksize", values, [NESTED_BLOCK_SIZE])
    offset = values["nested_offset"]
    if type(offset) not in (int, float) or not abs(offset) <= torch.finfo(torch.float32).max:
        raise _Invalid(f"nested_offset {_short(offset)} is not a number that fp32 can hold")
    exact = torch.tensor(offset, dtype=torch.float32).item()
    return QuantState(quant_type, block_size, dtype, torch.Size(shape), nested_block_size, exact)


def _one_of(key: str, values: Mapping[str, Any], options: list[Any]) -> Any:
    """Return a value that must be one of the options, of the same type: JSON's true is 1 to Python."""
    value = values[key]
    if type(value) is not type(options[0]) or value not in options:
        known = ", ".join(map(str, options))
        raise _Invalid(f"{key} is {_short(value)}, expected {'one of ' if len(options) > 1 else ''}{known}")
    return value


def _check_packed(name: str, layout: Layout, expected: Layout) -> None:
    (dtype, shape), (_, (needed, _)) = layout, expected
    if dtype not in _STORAGE:
        known = ", ".join(sorted(map(_plain, _STORAGE)))
        raise CheckpointError(f"tensor {name!r} has dtype {_plain(dtype)}, expected one of {known}")
    if (found := math.prod(shape) * dtype.itemsize) != needed:
        raise CheckpointError(f"tensor {name!r} has {found} packed bytes, expected {needed} for its quant_state")


def _check_vector(name: str, layout: Layout, expected: Layout) -> None:
    both_float = layout[0] in _FLOATS and expected[0] in _FLOATS
    if layout[1] != expected[1] or not (layout[0] == expected[0] or both_float):
        found, needed = (f"{_plain(dtype)} {list(shape)}" for dtype, shape in (layout, expected))
        raise CheckpointError(f"tensor {name!r} is {found}, expected {needed} for its quant_state")


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
