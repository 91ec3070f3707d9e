"""One torch.library operation per kernel, and the choice of the backend that computes it.

A backend is a module with the functions of `reference`. The tensors' device chooses it; LORAKIT_BACKEND or
`use_backend` overrides. The Triton backend is imported when it is first chosen, so nothing else needs triton. As
registered operations they go through torch.compile without a graph break.

They are defined on a `torch.library.Library`, which adds 4 µs to a call where `torch.library.custom_op` adds 40: a
training step of a small model makes a thousand.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.library import Library, infer_schema, register_fake

from . import cpu, reference

BACKENDS = ("reference", "cpu", "triton")  # the modules of this package that compute
_TRITON_DEVICES = ("cuda", "xpu")  # ROCm's are called cuda too
_chosen: ContextVar[str | None] = ContextVar("lorakit_backend", default=None)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute every operation within the context with one backend, whatever the device.

    Raises:
        ValueError: there is no such backend.
    """
    token = _chosen.set(_known(name, "backend"))
    try:
        yield
    finally:
        _chosen.reset(token)


def backend(device: torch.device) -> ModuleType:
    """Return the module that computes for tensors on `device`: the override, else the device's best.

    Raises:
        ValueError: LORAKIT_BACKEND names no backend.
        ImportError: the Triton backend was asked for, and triton is not installed.
    """
    if name := _chosen.get():
        return _module(name)
    if name := os.environ.get("LORAKIT_BACKEND"):
        return _module(_known(name, "LORAKIT_BACKEND"))
    if device.type in _TRITON_DEVICES and _has_triton():
        return _module("triton")
    return cpu if device.type == "cpu" and cpu.is_available() else reference


@cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __package__)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _known(name: str, what: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{what} '{name}' does not exist (known: {', '.join(BACKENDS)})")
    return name


# ---- operations ----------------------------------------------------------------------------------------------------

operations = Library("lorakit", "DEF")
_P = ParamSpec("_P")
_R = TypeVar("_R")


def _operation(
    *, writes: tuple[str, ...] = (), fake: Callable[_P, object]
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Register the function below as torch.ops.lorakit.<its name>, on all devices.

    Args:
        writes: the arguments that it writes to.
        fake: returns empty tensors of the shapes and dtypes that the function returns, for tracing.
    """

    def register(function: Callable[_P, _R]) -> Callable[_P, _R]:
        name = function.__name__
        operations.define(name + infer_schema(function, mutates_args=writes), tags=(torch.Tag.pt2_compliant_tag,))
        operations.impl(name, function, "CompositeExplicitAutograd")
        register_fake(f"lorakit::{name}", fake, lib=operations)
        overload: Callable[_P, _R] = getattr(torch.ops.lorakit, name).default

        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            # In inference mode nobody differentiates. The dispatcher's part of a small layer's time would be a third.
            if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled() and not _is_observed():
                return function(*args, **kwargs)
            return overload(*args, **kwargs)

        return functools.wraps(function)(call)

    return register


def _is_observed() -> bool:
    """Whether a mode, such as one that counts FLOPs or computes shapes alone, wants to see every operation."""
    observed: int = torch._C._len_torch_dispatch_stack()
    return observed > 0


def _empty_4bit(x: Tensor, boundaries: Tensor, order: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    packed = x.new_empty((x.numel() + 1) // 2, dtype=torch.uint8)
    return packed, x.new_empty((x.numel() + block_size - 1) // block_size, dtype=torch.float32)


@_operation(fake=_empty_4bit)
def quantize_4bit(x: Tensor, boundaries: Tensor, order: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """See `reference.quantize_4bit`."""
    packed, absmax = backend(x.device).quantize_4bit(x, boundaries, order, block_size)
    return packed, absmax


def _empty_8bit(x: Tensor, boundaries: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.numel(), dtype=torch.uint8)
    return codes, x.new_empty((x.numel() + block_size - 1) // block_size, dtype=torch.float32)


@_operation(fake=_empty_8bit)
def quantize_8bit(x: Tensor, boundaries: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """See `reference.quantize_8bit`."""
    codes, absmax = backend(x.device).quantize_8bit(x, boundaries, block_size)
    return codes, absmax


def _empty_scales(codes: Tensor, codebook: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    return codes.new_empty(codes.numel(), dtype=torch.float32)


@_operation(fake=_empty_scales)
def dequantize_8bit(codes: Tensor, codebook: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """See `reference.dequantize_8bit`."""
    values: Tensor = backend(codes.device).dequantize_8bit(codes, codebook, absmax, block_size)
    return values


def _empty_values(
    packed: Tensor,
    codebook: Tensor,
    absmax: Tensor,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    nested: Sequence[Tensor],
    nested_block_size: int,
) -> Tensor:
    return packed.new_empty(list(shape), dtype=dtype)


@_operation(fake=_empty_values)
def dequantize_4bit(
    packed: Tensor,
    codebook: Tensor,
    absmax: Tensor,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    nested: Sequence[Tensor],
    nested_block_size: int,
) -> Tensor:
    """Return the values of packed 4-bit codes as a fresh tensor; see `reference.dequantize_4bit`."""
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    backend(packed.device).dequantize_4bit(packed, codebook, absmax, block_size, out, nested, nested_block_size)
    return out


def _nothing(
    packed: Tensor,
    codebook: Tensor,
    absmax: Tensor,
    block_size: int,
    out: Tensor,
    nested: Sequence[Tensor],
    nested_block_size: int,
) -> None:
    return None


@_operation(writes=("out",), fake=_nothing)
def dequantize_4bit_out(
    packed: Tensor,
    codebook: Tensor,
    absmax: Tensor,
    block_size: int,
    out: Tensor,
    nested: Sequence[Tensor],
    nested_block_size: int,
) -> None:
    """Fill `out`, contiguous, with the values of packed 4-bit codes; see `reference.dequantize_4bit`."""
    backend(packed.device).dequantize_4bit(packed, codebook, absmax, block_size, out, nested, nested_block_size)
    increment_version(out)  # or autograd would not notice that a tensor it saved was overwritten


def _empty_result(
    x: Tensor,
    packed: Tensor,
    codebook: Tensor,
    absmax: Tensor,
    block_size: int,
    shape: Sequence[int],
    nested: Sequence[Tensor],
    nested_block_size: int,
    bias: Tensor | None,
    lora: Sequence[Tensor],
    scaling: float,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


@_operation(fake=_empty_result)
def linear_4bit(
    x: Tensor,
    packed: Tensor,
    codebook: Tensor,
    absmax: Tensor,
    block_size: int,
    shape: Sequence[int],
    nested: Sequence[Tensor],
    nested_block_size: int,
    bias: Tensor | None,
    lora: Sequence[Tensor],
    scaling: float,
) -> Tensor:
    """See `reference.linear_4bit`."""
    y: Tensor = backend(x.device).linear_4bit(
        x, packed, codebook, absmax, block_size, shape, nested, nested_block_size, bias, lora, scaling
    )
    return y


def _empty_gradient(
    dy: Tensor,
    packed: Tensor,
    codebook: Tensor,
    absmax: Tensor,
    block_size: int,
    shape: Sequence[int],
    nested: Sequence[Tensor],
    nested_block_size: int,
    lora: Sequence[Tensor],
) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], shape[1])


@_operation(fake=_empty_gradient)
def linear_4bit_dx(
    dy: Tensor,
    packed: Tensor,
    codebook: Tensor,
    absmax: Tensor,
    block_size: int,
    shape: Sequence[int],
    nested: Sequence[Tensor],
    nested_block_size: int,
    lora: Sequence[Tensor],
) -> Tensor:
    """See `reference.linear_4bit_dx`."""
    dx: Tensor = backend(dy.device).linear_4bit_dx(
        dy, packed, codebook, absmax, block_size, shape, nested, nested_block_size, lora
    )
    return dx


def _added(
    dx: Tensor,
    dy: Tensor,
    packed: Tensor,
    codebook: Tensor,
    absmax: Tensor,
    block_size: int,
    shape: Sequence[int],
    nested: Sequence[Tensor],
    nested_block_size: int,
) -> None:
    return None


@_operation(writes=("dx",), fake=_added)
def add_linear_4bit_dx(
    dx: Tensor,
    dy: Tensor,
    packed: Tensor,
    codebook: Tensor,
    absmax: Tensor,
    block_size: int,
    shape: Sequence[int],
    nested: Sequence[Tensor],
    nested_block_size: int,
) -> None:
    """See `reference.add_linear_4bit_dx`."""
    backend(dy.device).add_linear_4bit_dx(
        dx, dy, packed, codebook, absmax, block_size, shape, nested, nested_block_size
    )
    increment_version(dx)
