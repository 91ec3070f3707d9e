"""`UpdatedWeight`: the weight of an adapted layer, for code that reads it instead of calling the layer.

Models read `layer.weight` to multiply by it, or only for its dtype. The second must cost nothing and the first must not
lose the adapter. So the sum W + update is computed when something is computed with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.nn.functional import embedding
from torch.utils._pytree import tree_map_only

from ...errors import AdapterError


class UpdatesWeight(Protocol):
    """A layer that can compute the weight with its updates."""

    @property
    def label(self) -> str:
        """Name the layer in a message."""

    def updated_weight(self) -> Tensor:
        """Return the weight with the updates of the active adapters, in its own shape, differentiable."""

    def lookup(self, ids: Tensor, *options: Any) -> Tensor | None:
        """Return the rows with these indices, (...) -> (..., columns), or None if the layer is no embedding."""


_PROPERTIES = (
    "dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_meta", "is_cuda", "is_cpu", "is_leaf", "grad",
    "grad_fn", "itemsize", "nbytes",
)  # fmt: skip
_METHODS = (
    "size", "dim", "numel", "stride", "is_floating_point", "is_complex", "element_size", "is_contiguous", "get_device",
    "__len__",
)  # fmt: skip
# What a tensor says of itself without its numbers.
_ABOUT = {getattr(Tensor, name).__get__ for name in _PROPERTIES} | {getattr(Tensor, name) for name in _METHODS}
_ABOUT |= {torch.is_floating_point, torch.numel}
_VIEWS = (Tensor.detach, Tensor.data.__get__)  # type: ignore[attr-defined] # they share their memory with the weight


class UpdatedWeight(Tensor):
    """W + update, computed when it is used: shape, dtype and device are those of the base weight.

    It is read-only, since there is no memory that a write could change.

    Attributes:
        base: the base weight.

    Raises:
        AdapterError: it is written to, or the update cannot be expressed as a change of the weight.
    """

    base: Tensor
    _layer: UpdatesWeight
    _is_detached: bool

    @staticmethod
    def __new__(cls, layer: UpdatesWeight, weight: Tensor, trains: bool, is_detached: bool = False) -> Self:
        """Make the weight of a layer.

        Args:
            weight: the base weight.
            trains: whether a gradient reaches the adapters' parameters through it.
            is_detached: whether no gradient is wanted.
        """
        requires_grad = trains and weight.is_floating_point() and torch.is_grad_enabled() and not is_detached
        with torch._C.DisableTorchFunctionSubclass():
            made = Tensor._make_wrapper_subclass(
                cls, weight.shape, dtype=weight.dtype, device=weight.device, requires_grad=requires_grad
            )
            if requires_grad:
                made.register_hook(_lost)
        made.base, made._layer, made._is_detached = weight, layer, is_detached
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute with the sum, except where the base weight alone, or a few rows, are enough."""
        kwargs = kwargs or {}
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        values = (*args, *kwargs.values())
        own = next((arg for arg in values if isinstance(arg, UpdatedWeight)), None)
        if own is not None and own is values[0] and func in _VIEWS:
            return UpdatedWeight(own._layer, own.base, trains=False, is_detached=True)
        if own is not None and own is values[0] and _writes(func):
            raise AdapterError(
                f"{own._layer.label}: its weight is read through an adapter and cannot be written to; write to "
                "base_layer.weight"
            )
        if func is embedding and own is not None and not isinstance(args[0], UpdatedWeight):
            options = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
            given = dict(zip(options, args[2:], strict=False)) | dict(kwargs)
            rows = None if given.get("max_norm") is not None else own._layer.lookup(args[0], given.get("padding_idx"))
            if rows is not None:
                return rows
        args, kwargs = tree_map_only(UpdatedWeight, UpdatedWeight._computed, (args, dict(kwargs)))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # PyTorch's own is no class method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse operations that PyTorch starts below Python, where the sum cannot take the place of this tensor."""
        raise AdapterError(f"the weight of an adapted layer reached {func}, which cannot compute with it")

    def _computed(self) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._is_detached):
            return self._layer.updated_weight()


def _writes(func: Callable[..., Any]) -> bool:
    """Return whether a function writes to its first argument: add_, __iadd__, __setitem__, normal_, `data = ...`."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in ("__setitem__", "__set__") or (name.startswith("__i") and name[3:] in _IN_PLACE)


_IN_PLACE = {f"{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}


def _lost(gradient: Tensor) -> Tensor:
    """Refuse a gradient that a function has computed for this tensor alone: it would not reach the adapter."""
    raise AdapterError(
        "a function with a backward pass of its own took the weight of an adapted layer, so its gradient cannot reach "
        "the adapter; leave that layer out with exclude_modules"
    )
