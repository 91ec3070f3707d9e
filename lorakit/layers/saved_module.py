"""Modules that an adapter trains otherwise than by a low-rank update: whole, some rows of a table, or the bias."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from .adapted import AdapterModule
from .row_products import forward_by_rows


@dataclass(frozen=True)
class SavedCopy:
    """What a `SavedModule` holds of one adapter.

    Attributes:
        module: the copy.
        trained: names of its parameters that are trained.
    """

    module: nn.Module
    trained: tuple[str, ...]


class SavedModule(AdapterModule):
    """A frozen module of which each adapter trains a full copy (`modules_to_save`) or a copy of some parameters.

    The copy of the active adapter computes; of several active adapters only one may have a copy, as there is no sum of
    copies.

    Raises:
        AdapterError: in forward, more than one active adapter has a copy.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.copies = nn.ModuleDict()
        self._trained: dict[str, tuple[str, ...]] = {}

    def shapes(self, parameters: Iterable[str] | None = None) -> dict[str, tuple[int, ...]]:
        """Return what `add` will train: name of the parameter -> shape."""
        own = dict(self.base_layer.named_parameters())
        return {name: tuple(own[name].shape) for name in (own if parameters is None else parameters)}

    def add(self, name: str, dtype: torch.dtype | None = None, parameters: Iterable[str] | None = None) -> None:
        """Attach a copy of the module, equal to it for now.

        Args:
            dtype: of the copied parameters; None: their own.
            parameters: names of those that are trained; the copy shares the others. None: all of them.
        """
        own = dict(self.base_layer.named_parameters())
        trained = tuple(own if parameters is None else parameters)
        shared = {id(p): p for key, p in own.items() if key not in trained}
        twin = copy.deepcopy(self.base_layer, cast(dict[int, Any], shared))
        twin.requires_grad_(False)
        for key in trained:
            parent, _, last = key.rpartition(".")
            holder = twin.get_submodule(parent)
            setattr(holder, last, nn.Parameter(own[key].detach().to(dtype or own[key].dtype, copy=True)))
        self.attach(name, SavedCopy(twin, trained))

    def attach(self, name: str, record: SavedCopy) -> None:
        self.copies[name], self._trained[name] = record.module, record.trained

    def detach(self, name: str) -> SavedCopy:
        self._deactivate(name)
        return SavedCopy(self.copies.pop(name), self._trained.pop(name))

    def names(self) -> list[str]:
        return list(self._trained)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        return {key: self.copies[name].get_parameter(key) for key in self._trained[name]}

    def supports_rows(self, name: str) -> bool:
        return isinstance(self.base_layer, nn.Linear | nn.Embedding)

    @property
    def weight(self) -> Tensor:
        """The weight that forward uses, for models that read it."""
        return cast(Tensor, self._current().weight)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.rows is not None and self.supports_rows(""):
            return forward_by_rows(self, *args, **kwargs)
        current = self._current()
        if current is self.base_layer:
            return current(*args, **kwargs)
        # A copy in fp32 for a model in bf16, or its bias alone: it is trained in fp32 and computes in bf16.
        own = {key: p.dtype for key, p in self.base_layer.named_parameters()}
        cast_down = {key: p.to(own[key]) for key, p in current.named_parameters() if p.dtype != own[key]}
        return torch.func.functional_call(current, cast_down, args, kwargs) if cast_down else current(*args, **kwargs)

    def _current(self) -> nn.Module:
        if len(self.active) > 1:
            raise AdapterError(
                f"adapters {', '.join(self.active)} each have their own copy of one module; one of them can be active"
            )
        return self.copies[self.active[0]] if self.active else self.base_layer
