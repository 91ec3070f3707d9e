"""The choice of the backend, and the registration of operations with torch.library.

A backend is a module whose functions have the operations' names. The tensors' device chooses the backend;
LORAKIT_BACKEND or `use_backend` overrides it. The definition computes what a backend lacks. The Triton backend is
imported when it is first chosen, so nothing else needs triton. torch.compile traces the registered operations without
a graph break.

The operations are defined on a `torch.library.Library`, which adds 4 µs to a call; `torch.library.custom_op` adds 40.
A training step of a small model makes a thousand calls.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import cache
from types import ModuleType, NoneType
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar, cast, get_type_hints

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.library import Library, infer_schema, register_autograd, register_fake

from .transforms import is_followed, is_transformed

BACKENDS = ("reference", "cpu", "triton")  # modules of this package
_TRITON_DEVICES = ("cuda", "xpu")  # PyTorch calls ROCm devices cuda too
_chosen: ContextVar[str | None] = ContextVar("lorakit_backend", default=None)


# ---- the backend ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the context, compute every operation with one backend, whatever the device.

    Raises:
        ValueError: there is no such backend.
    """
    token = _chosen.set(_checked_name(name, "backend"))
    try:
        yield
    finally:
        _chosen.reset(token)


def backend(device: torch.device) -> ModuleType:
    """Return the backend for tensors on `device`: the override if there is one, else the device's best.

    Raises:
        ValueError: LORAKIT_BACKEND names no backend.
        ImportError: the Triton backend was chosen, and triton is not installed.
    """
    if name := _chosen.get():
        return _module(name)
    if name := os.environ.get("LORAKIT_BACKEND"):
        return _module(_checked_name(name, "LORAKIT_BACKEND"))
    if device.type in _TRITON_DEVICES and _has_triton():
        return _module("triton")
    return _module("cpu" if device.type == "cpu" and _module("cpu").is_available() else "reference")


@cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __package__)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _checked_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} '{name}' does not exist (known: {', '.join(BACKENDS)})")
    return name


# ---- registration --------------------------------------------------------------------------------------------------

_library = Library("lorakit", "DEF")
_P = ParamSpec("_P")
_R = TypeVar("_R")


class Operation(Protocol[_P, _R]):
    """A registered operation. A call takes the definition's arguments, and the chosen backend computes it.

    Attributes:
        definition: the operation in plain PyTorch: the oracle that the backends are tested against.
    """

    definition: Callable[_P, _R]

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Compute with the backend of the first tensor's device."""


def operation(
    *,
    fake: Callable[..., object],
    writes: Sequence[str] = (),
    written_if: str | None = None,
    by_definition: bool = False,
) -> Callable[[Callable[_P, _R]], Operation[_P, _R]]:
    """Register the decorated definition as torch.ops.lorakit.<its name>, on all devices.

    An argument that is a record, such as `Weight4bit`, is registered as one argument per field, <name>_<field>.

    Args:
        fake: returns empty tensors of the shapes and dtypes that the definition returns, for tracing.
        writes: the registered arguments that the operation writes to.
        written_if: the argument that says whether it writes; None: it always does.
        by_definition: it has no gradient of its own; where autograd follows it, the definition computes.
    """

    def register(definition: Callable[_P, _R]) -> Operation[_P, _R]:
        name, signature = definition.__name__, inspect.signature(definition)
        arguments = _Arguments.of(definition)
        plain: Callable[..., Any] = definition

        def compute(*args: Any) -> Any:
            x = args[0] if isinstance(args[0], Tensor) else args[0][0]
            # Gradients are checked in fp64, which no kernel takes.
            kernel = None if x.dtype == torch.float64 else getattr(backend(x.device), name, None)
            return (kernel or plain)(*args)

        def compute_flat(*flat: Any) -> Any:
            result = compute(*arguments.grouped(flat))
            if writes and (written_if is None or flat[arguments.names.index(written_if)]):
                # Without this, autograd would not notice that a tensor it saved was overwritten.
                increment_version([flat[arguments.names.index(written)] for written in writes])
            return result

        compute_flat.__signature__ = arguments.signature  # type: ignore[attr-defined]
        schema = name + infer_schema(compute_flat, mutates_args=writes)
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, compute_flat, "CompositeExplicitAutograd")
        # The vmap of `is_grads_batched`, which autograd.functional's `vectorize` uses, asks for no transform.
        _library.impl(name, lambda *flat: plain(*arguments.grouped(flat)), "Batched")
        register_fake(f"lorakit::{name}", lambda *flat: fake(*arguments.grouped(flat)), lib=_library)
        overload = getattr(torch.ops.lorakit, name).default
        is_pure = not writes

        def call(*args: Any, **kwargs: Any) -> Any:
            if kwargs or len(args) != len(arguments.spans):  # binding takes 8 µs
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                args = bound.args
            # Inference mode needs no gradient. The dispatcher would take a third of a small layer's time.
            is_direct = is_pure and not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
            if is_direct and not _is_observed():
                return compute(*args)
            flat = arguments.flat(args)
            follows_definition = by_definition and torch.is_grad_enabled()
            if (follows_definition or is_transformed()) and any(map(is_followed, _tensors(flat))):
                return plain(*args)
            return overload(*flat)

        registered = cast(Operation[_P, _R], functools.wraps(definition)(call))
        registered.definition = definition
        return registered

    return register


def differentiate(
    operation: Operation[..., Any], backward: Callable[..., Any], setup_context: Callable[[Any, Any, Any], None]
) -> None:
    """Register the gradient of an operation.

    Args:
        backward: (ctx, *gradients of the results) -> a gradient or None for each registered argument; for a list of
            tensors, a list of them.
        setup_context: (ctx, registered arguments, result), called in the forward pass; saves what backward needs.
    """
    name = f"lorakit::{operation.definition.__name__}"
    register_autograd(name, backward, setup_context=setup_context, lib=_library)


class _Arguments(NamedTuple):
    """The arguments of a definition, and the arguments they are registered as.

    Attributes:
        spans: for each argument, its type if that is a record, and the range of its registered arguments.
        names: names of the registered arguments.
        signature: signature of the registered operation.
    """

    spans: tuple[tuple[type[NamedTuple] | None, int, int], ...]
    names: tuple[str, ...]
    signature: inspect.Signature

    @staticmethod
    def of(definition: Callable[..., Any]) -> _Arguments:
        hints = get_type_hints(definition)
        result = hints.pop("return")
        spans: list[tuple[type[NamedTuple] | None, int, int]] = []
        registered: dict[str, Any] = {}
        for name, hint in hints.items():
            first, is_record = len(registered), isinstance(hint, type) and hasattr(hint, "_fields")
            fields = {f"{name}_{field}": kind for field, kind in get_type_hints(hint).items()} if is_record else {}
            registered |= fields or {name: hint}
            spans.append((hint if is_record else None, first, len(registered)))
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, kind, annotation=hint) for name, hint in registered.items()]
        signature = inspect.Signature(parameters, return_annotation=None if result is NoneType else result)
        return _Arguments(tuple(spans), tuple(registered), signature)

    def flat(self, args: Sequence[Any]) -> Sequence[Any]:
        """Return the registered arguments, each record replaced by its fields."""
        flat: list[Any] = []
        for (record, _, _), argument in zip(self.spans, args, strict=True):
            flat += argument if record else (argument,)
        return flat

    def grouped(self, flat: Sequence[Any]) -> list[Any]:
        """Return the definition's arguments, with the fields of each record put together."""
        return [record._make(flat[first:last]) if record else flat[first] for record, first, last in self.spans]


def _tensors(flat: Sequence[Any]) -> Iterator[Tensor]:
    """Yield the tensors among registered arguments."""
    for argument in flat:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from _tensors(argument)


def _is_observed() -> bool:
    """Return whether a dispatch mode sees every operation, such as one that counts FLOPs or computes only shapes."""
    observed: int = torch._C._len_torch_dispatch_stack()
    return observed > 0
