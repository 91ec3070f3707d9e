"""`SavedModule`: an adapter trains a full copy of a module, or a copy of some of its parameters such as the bias."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from .adapter_module import AdapterModule
from .row_products import forward_by_rows


@dataclass(frozen=True)
class SavedCopy:
    """The record of one adapter on a `SavedModule`.

    Attributes:
        module: the copy.
        trained: names of its trained parameters.
    """

    module: nn.Module
    trained: tuple[str, ...]


class SavedModule(AdapterModule):
    """A frozen module; each adapter trains a full copy of it (`modules_to_save`) or a copy of some of its parameters.

    The active adapter's copy replaces the module in forward. Only one active adapter may have a copy, since copies
    cannot be summed.

    Raises:
        AdapterError: in forward, more than one active adapter has a copy.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.copies = nn.ModuleDict().train(self.training)
        self._trained: dict[str, tuple[str, ...]] = {}

    def shapes(self, parameters: Iterable[str] | None = None) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the parameters that `add` will train: parameter name -> shape."""
        originals = dict(self.base_layer.named_parameters())
        return {name: tuple(originals[name].shape) for name in (originals if parameters is None else parameters)}

    def add(self, name: str, dtype: torch.dtype | None = None, parameters: Iterable[str] | None = None) -> None:
        """Attach a copy of the module, at first equal to it.

        Args:
            dtype: dtype of the copied parameters; None: the module's own.
            parameters: names of the parameters to train; the copy shares the others. None: all of them.
        """
        originals = dict(self.base_layer.named_parameters())
        trained = tuple(originals if parameters is None else parameters)
        shared = {id(p): p for key, p in originals.items() if key not in trained}
        duplicate = copy.deepcopy(self.base_layer, cast(dict[int, Any], shared))
        duplicate.requires_grad_(False)
        for key in trained:
            parent, _, last = key.rpartition(".")
            holder, original = duplicate.get_submodule(parent), originals[key]
            setattr(holder, last, nn.Parameter(original.detach().to(dtype or original.dtype, copy=True)))
        self.attach(name, SavedCopy(duplicate, trained))

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

    def set_mode(self, training: bool) -> None:
        self.training = self.copies.training = training
        for copied in self.copies.values():
            for path, part in copied.named_modules():  # a frozen part may be in evaluation mode on its own
                part.training = self.base_layer.get_submodule(path).training

    def answer(self, name: str) -> Any:
        return getattr(self._current(), name)

    @property
    def weight(self) -> Tensor:
        """The weight that forward uses, of the base weight's shape, for models that read it."""
        return cast(Tensor, self._current().weight)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.rows is not None and self.supports_rows(""):
            return forward_by_rows(self, *args, **kwargs)
        current = self._current()
        if current is self.base_layer:
            return current(*args, **kwargs)
        # An fp32 copy in a bf16 model, whole or of the bias alone, is trained in fp32 and computes in bf16.
        dtypes = {key: p.dtype for key, p in self.base_layer.named_parameters()}
        cast_down = {key: p.to(dtypes[key]) for key, p in current.named_parameters() if p.dtype != dtypes[key]}
        return torch.func.functional_call(current, cast_down, args, kwargs) if cast_down else current(*args, **kwargs)

    def _current(self) -> nn.Module:
        if len(self.active) > 1:
            raise AdapterError(
                f"adapters {', '.join(self.active)} each have their own copy of one module; only one can be active"
            )
        return self.copies[self.active[0]] if self.active else self.base_layer
