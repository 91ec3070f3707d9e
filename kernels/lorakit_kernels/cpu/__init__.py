"""The operations of `reference`, and the optimizer's, in C++, for tensors on the CPU: the same results, bit for bit.

The library is compiled on first use (see `build`) for the processor's instruction set: AVX-512, AVX2 or neither.
LORAKIT_CPU_ISA=generic|avx2|avx512 picks a smaller one. The functions here have the signatures of the definitions; they
check what C++ cannot see, the dtypes and sizes behind the pointers, and hand the pointers over.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import warnings
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from ctypes import CDLL, c_float, c_int, c_int64, c_uint, c_void_p
from functools import cache

import torch
from torch import Tensor

from .. import reference
from ..reference_training import STATE_BLOCK_SIZE, AdamWFactors
from .build import INSTRUCTION_SETS, BuildError, library_path

__all__ = [
    "BuildError",
    "adamw_8bit",
    "dequantize_4bit",
    "dequantize_8bit",
    "is_available",
    "library",
    "one_thread",
    "quantize_4bit",
    "quantize_8bit",
]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as `enum Dtype` in blocks.h
_alone: ContextVar[bool] = ContextVar("lorakit_one_thread", default=False)
_P, _N, _THREADS = c_void_p, c_int64, (c_void_p, c_uint)
_SIGNATURES = {
    "quantize_4bit": (_P, c_int, _N, _N, _P, _P, c_int, _P, _P, *_THREADS),
    "quantize_8bit": (_P, c_int, _N, _N, _P, c_int, _P, _P, *_THREADS),
    "dequantize_8bit": (_P, _P, _P, _N, _N, _P, *_THREADS),
    "dequantize_4bit": (_P, _P, _P, _P, _P, _P, _N, _N, _N, _P, c_int, *_THREADS),
    "adamw_8bit": (_P, _P, c_int, _N, *[_P] * 8, *[c_float] * 8, *_THREADS),
}


def quantize_4bit(x: Tensor, boundaries: Tensor, order: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """See `reference.quantize_4bit`.

    Raises:
        ValueError: a tensor has another dtype, size or device than the operation reads; so for all functions here.
    """
    x, count, steps = _source(x), x.numel(), _at_most(15, boundaries)
    boundaries = _readable("boundaries", boundaries, torch.float32, steps)
    order = _readable("order", order, torch.uint8, steps + 1)
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(_blocks(count, block_size, even=True), dtype=torch.float32)
    library().quantize_4bit(
        x.data_ptr(), _DTYPES[x.dtype], count, block_size, boundaries.data_ptr(), order.data_ptr(), steps,
        packed.data_ptr(), absmax.data_ptr(), *_threads(),
    )  # fmt: skip
    return packed, absmax


def quantize_8bit(x: Tensor, boundaries: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """See `reference.quantize_8bit`."""
    x, count, steps = _source(x), x.numel(), _at_most(255, boundaries)
    boundaries = _readable("boundaries", boundaries, torch.float32, steps)
    codes = torch.empty(count, dtype=torch.uint8)
    absmax = torch.empty(_blocks(count, block_size), dtype=torch.float32)
    library().quantize_8bit(
        x.data_ptr(), _DTYPES[x.dtype], count, block_size, boundaries.data_ptr(), steps,
        codes.data_ptr(), absmax.data_ptr(), *_threads(),
    )  # fmt: skip
    return codes, absmax


def dequantize_8bit(codes: Tensor, codebook: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """See `reference.dequantize_8bit`."""
    count = codes.numel()
    codes = _readable("codes", codes, torch.uint8, count)
    codebook = _readable("codebook", codebook, torch.float32, 256)
    absmax = _readable("absmax", absmax, torch.float32, _blocks(count, block_size))
    values = torch.empty(count, dtype=torch.float32)
    library().dequantize_8bit(
        codes.data_ptr(), codebook.data_ptr(), absmax.data_ptr(), count, block_size, values.data_ptr(), *_threads()
    )
    return values


def dequantize_4bit(
    packed: Tensor,
    codebook: Tensor,
    absmax: Tensor,
    block_size: int,
    out: Tensor,
    nested: Sequence[Tensor] = (),
    nested_block_size: int = 256,
) -> None:
    """See `reference.dequantize_4bit`."""
    if out.dtype not in _DTYPES:
        return reference.dequantize_4bit(packed, codebook, absmax, block_size, out, nested, nested_block_size)
    count = out.numel()
    blocks = _blocks(count, block_size, even=True)
    packed = _readable("packed", packed, torch.uint8, (count + 1) // 2)
    codebook = _readable("codebook", codebook, torch.float32, 16)
    absmax = _readable("absmax", absmax, torch.uint8 if nested else torch.float32, blocks)
    nested = [
        _readable(f"nested {name}", tensor, torch.float32, size)
        for name, tensor, size in zip(
            ("codebook", "absmax", "offset"), nested, (256, _blocks(blocks, nested_block_size), 1), strict=bool(nested)
        )
    ]
    if not out.is_contiguous() or not out.is_cpu:
        raise ValueError("out must be contiguous, on the CPU")
    library().dequantize_4bit(
        packed.data_ptr(), codebook.data_ptr(), absmax.data_ptr(),
        *([tensor.data_ptr() for tensor in nested] or (None, None, None)), nested_block_size,
        count, block_size, out.data_ptr(), _DTYPES[out.dtype], *_threads(),
    )  # fmt: skip
    return None


def adamw_8bit(
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    first_absmax: Tensor,
    second: Tensor,
    second_absmax: Tensor,
    first_map: Sequence[Tensor],
    second_map: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """See `reference_training.adamw_8bit`."""
    count, dtype = parameter.numel(), parameter.dtype
    if dtype not in _DTYPES:
        raise ValueError(f"parameter must be fp32, bf16 or fp16, got {dtype}")
    blocks = _blocks(count, STATE_BLOCK_SIZE)
    parameter = _writable("parameter", parameter, dtype, count)
    gradient = _readable("gradient", gradient, dtype, count)
    states = [
        _writable(name, tensor, wanted, size)
        for name, tensor, wanted, size in (
            ("first", first, torch.uint8, count),
            ("first_absmax", first_absmax, torch.float32, blocks),
            ("second", second, torch.uint8, count),
            ("second_absmax", second_absmax, torch.float32, blocks),
        )
    ]
    maps = [
        _readable(name, tensor, torch.float32, size)
        for table in (first_map, second_map)
        for name, tensor, size in zip(("values", "boundaries"), table, (256, 255), strict=True)
    ]
    library().adamw_8bit(
        parameter.data_ptr(), gradient.data_ptr(), _DTYPES[dtype], count, *(t.data_ptr() for t in (*states, *maps)),
        beta1, 1 - beta1, beta2, 1 - beta2, *AdamWFactors.of_step(step, lr, beta1, beta2, weight_decay), eps,
        *_threads(),
    )  # fmt: skip


# ---- the library ---------------------------------------------------------------------------------------------------


def is_available() -> bool:
    """Return whether the library is there, building it if need be; a failure is warned about, once."""
    result = _attempt(os.environ.get("LORAKIT_CPU_ISA"))
    if isinstance(result, BuildError):
        _warn(str(result))
        return False
    return True


def library() -> CDLL:
    """Return the library for the processor, or for LORAKIT_CPU_ISA.

    Raises:
        BuildError: it cannot be built or loaded.
        ValueError: LORAKIT_CPU_ISA names no instruction set, or one that the processor does not have.
    """
    result = _attempt(os.environ.get("LORAKIT_CPU_ISA"))
    if isinstance(result, BuildError):
        raise result
    return result


@cache
def _attempt(choice: str | None) -> CDLL | BuildError:
    """Build and load once; a failure is remembered too, or every operation would try again."""
    instruction_set = _instruction_set(choice)
    try:
        path = library_path(instruction_set)
        try:
            loaded = CDLL(str(path))
        except OSError:  # a damaged file, or none a moment later: build it again
            path.unlink(missing_ok=True)
            loaded = CDLL(str(library_path(instruction_set)))
    except BuildError as error:
        return error
    except OSError as error:
        return BuildError(f"cannot load the compiled library: {error}; LORAKIT_CACHE names another folder for it")
    for name, signature in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = signature, None
    return loaded


@cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"4-bit weights take the slower path in plain PyTorch on the CPU, with the same results: {reason}. "
        "LORAKIT_BACKEND=reference chooses it without this warning.",
        RuntimeWarning,
        stacklevel=2,
    )


def _instruction_set(choice: str | None) -> str:
    """Return the choice, if the processor has it, or its best."""
    detected = torch.backends.cpu.get_cpu_capability()  # by which PyTorch chooses its own kernels
    best = {"AVX512": "avx512", "AVX2": "avx2"}.get(detected, "generic")
    known = list(INSTRUCTION_SETS)  # each includes those before it
    if choice and choice not in known:
        raise ValueError(f"LORAKIT_CPU_ISA is '{choice}', expected one of {', '.join(known)}")
    if choice and known.index(choice) > known.index(best):
        raise ValueError(f"LORAKIT_CPU_ISA is '{choice}', but this processor has '{best}' at most")
    return choice or best


# ---- arguments -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute within the context in the calling thread alone: for callers that are several threads themselves."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def _threads() -> tuple[int | None, int]:
    return (None, 1) if _alone.get() else (_fork(), torch.get_num_threads())


@cache
def _fork() -> int | None:
    """Return the address of GOMP_parallel in the OpenMP runtime that PyTorch loaded; None means a single thread."""
    try:
        return ctypes.cast(CDLL(None).GOMP_parallel, c_void_p).value
    except AttributeError:  # another runtime, as on macOS
        return None


def _source(x: Tensor) -> Tensor:
    """Return x as the operations read it. Whole, not part by part: of a transposed matrix that is 2.3 times faster."""
    if not x.is_cpu:
        raise ValueError(f"x must be on the CPU, got {x.device}")
    return (x if x.dtype in _DTYPES else x.float()).contiguous()


def _blocks(count: int, block_size: int, even: bool = False) -> int:
    if block_size < 1 or (even and block_size % 2):
        raise ValueError(f"block_size must be {'even and ' if even else ''}positive, got {block_size}")
    return -(-count // block_size)


def _at_most(limit: int, boundaries: Tensor) -> int:
    if boundaries.numel() > limit:
        raise ValueError(f"expected at most {limit} boundaries, got {boundaries.numel()}")
    return boundaries.numel()


def _readable(name: str, tensor: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """Return the tensor, contiguous, once it is safe to read `count` elements behind its pointer."""
    if tensor.dtype != dtype or tensor.numel() < count or not tensor.is_cpu:
        raise ValueError(
            f"{name} must have at least {count} elements of {dtype} on the CPU, "
            f"got {tensor.numel()} of {tensor.dtype} on {tensor.device}"
        )
    return tensor.contiguous()


def _writable(name: str, tensor: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """Return the tensor itself, once it is safe to read and write `count` elements behind its pointer."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
    return _readable(name, tensor, dtype, count)
