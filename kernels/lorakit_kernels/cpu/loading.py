"""The compiled library: loaded once for the processor's instruction set, its functions' signatures, its threads.

`build` compiles it on first use for the best instruction set of the processor, from AVX-512 with bf16 products down to
none. LORAKIT_CPU_ISA=generic|avx2|avx512|avx512_bf16 picks a smaller set.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from ctypes import CDLL, c_float, c_int, c_int64, c_uint, c_void_p
from functools import cache

import torch

from ..operands import Weight4bit
from .build import INSTRUCTION_SETS, BuildError, library_path

CPU = torch.device("cpu")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as `enum Dtype` in blocks.h
_alone: ContextVar[bool] = ContextVar("lorakit_one_thread", default=False)
_P, _N, _THREADS = c_void_p, c_int64, (c_void_p, c_uint)
_WEIGHT = (*[_P] * 6, _N, _N)
SIGNATURES = {  # of every function of the library
    "quantize_4bit": (_P, c_int, _N, _N, _P, _P, c_int, _P, _P, *_THREADS),
    "quantize_8bit": (_P, c_int, _N, _N, _P, c_int, _P, _P, *_THREADS),
    "dequantize_8bit": (_P, _P, _P, _N, _N, _P, *_THREADS),
    "dequantize_4bit": (*_WEIGHT, _N, _P, c_int, *_THREADS),
    "dequantize_part": (*_WEIGHT, *[_N] * 5, _P, c_int, *_THREADS),
    "linear_4bit": (_P, c_int, _N, *_WEIGHT, _N, _N, _P, _P, *_THREADS),
    "cross_entropy": (_P, c_int, _N, _N, _P, c_int, _P, *_THREADS),
    "adamw_8bit": (_P, _P, c_int, _N, *[_P] * 8, *[c_float] * 8, *_THREADS),
    "rms_norm": (_P, c_int, _P, c_float, _N, _N, _P, c_int, _P, *_THREADS),
    "rms_norm_backward": (_P, c_int, _P, c_int, _P, _P, _N, _N, _P, *_THREADS),
    "rope": (_P, c_int, *[_N] * 5, _P, _P, c_int, _P, *_THREADS),
    "swiglu": (_P, _P, c_int, _N, _P, *_THREADS),
    "drop": (_P, c_int, _N, _N, c_uint, _P, *_THREADS),
    "swiglu_backward": (_P, _P, _P, c_int, _N, _P, _P, *_THREADS),
}


def pointers(weight: Weight4bit) -> tuple[int | None, ...]:
    """Return the arguments for a checked weight, in the order of `struct Weight` in dequantize.h."""
    packed, codebook, absmax, block_size, _, nested, nested_block_size = weight
    tables = [tensor.data_ptr() for tensor in nested] or (None, None, None)
    return packed.data_ptr(), codebook.data_ptr(), absmax.data_ptr(), *tables, nested_block_size, block_size


def is_available() -> bool:
    """Return whether the library can be loaded; build it if it is missing, and warn once if that fails."""
    result = _attempt(os.environ.get("LORAKIT_CPU_ISA"))
    if isinstance(result, BuildError):
        _warn(
            f"the CPU takes the slower path in plain PyTorch, with the same 4-bit weights: {result}. "
            "LORAKIT_BACKEND=reference chooses this path without a warning."
        )
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
    """Build and load once. A failure is remembered too, or every operation would try again.

    Without a choice, a compiler that is too old for the processor's best instructions builds for the next smaller set.
    """
    wanted = _instruction_set(choice)
    failures: list[BuildError] = []
    for instruction_set in [wanted] if choice else reversed(instruction_sets()):
        result = _load(instruction_set)
        if not isinstance(result, BuildError):
            if failures:
                _warn(f"the CPU computes with {instruction_set} instructions, not with {wanted}: {failures[0]}")
            return result
        failures.append(result)
    return failures[0]


def _load(instruction_set: str) -> CDLL | BuildError:
    try:
        path = library_path(instruction_set)
        try:
            loaded = CDLL(str(path))
        except OSError:  # a damaged file, or one that was deleted a moment ago: build it again
            path.unlink(missing_ok=True)
            loaded = CDLL(str(library_path(instruction_set)))
    except BuildError as error:
        return error
    except OSError as error:
        return BuildError(f"cannot load the compiled library: {error}; LORAKIT_CACHE names another folder for it")
    for name, signature in SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = signature, None
    return loaded


@cache
def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def instruction_sets() -> list[str]:
    """Return the `build.INSTRUCTION_SETS` that this processor has, each including those before it."""
    detected = torch.backends.cpu.get_cpu_capability()  # PyTorch chooses its own kernels by it
    best = {"AVX512": "avx512", "AVX2": "avx2"}.get(detected, "generic")
    if best == "avx512" and torch.cpu._is_avx512_bf16_supported():
        best = "avx512_bf16"
    known = list(INSTRUCTION_SETS)
    return known[: known.index(best) + 1]


def _instruction_set(choice: str | None) -> str:
    """Return the chosen instruction set after checking that the processor has it; without a choice, the best."""
    available = instruction_sets()
    if choice and choice not in INSTRUCTION_SETS:
        raise ValueError(f"LORAKIT_CPU_ISA is '{choice}', expected one of {', '.join(INSTRUCTION_SETS)}")
    if choice and choice not in available:
        raise ValueError(f"LORAKIT_CPU_ISA is '{choice}', but this processor has '{available[-1]}' at most")
    return choice or available[-1]


# ---- threads -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within the context, compute in the calling thread alone: for callers that run several threads themselves."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def threads() -> tuple[int | None, int]:
    """Return the last arguments of every function: how to fork (None: not at all) and the number of threads."""
    return (None, 1) if _alone.get() else (_fork(), torch.get_num_threads())


@cache
def _fork() -> int | None:
    """Return the address of GOMP_parallel in the OpenMP runtime that PyTorch loaded, or None for a single thread."""
    try:
        return ctypes.cast(CDLL(None).GOMP_parallel, c_void_p).value
    except AttributeError:  # another runtime, as on macOS
        return None
