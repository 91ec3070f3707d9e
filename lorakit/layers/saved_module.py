"""`SavedModule`: an adapter trains a full copy of a module, or a copy of some of its parameters such as the bias."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

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
        trained: names of its trained parameters; one that is tied within the module has one name.
        is_whole: whether it is a copy of all parameters and of the buffers, such as running statistics.
    """

    module: nn.Module
    trained: tuple[str, ...]
    is_whole: bool


class SavedModule(AdapterModule):
    """A frozen module; each adapter trains a full copy of it (`modules_to_save`) or a copy of some of its parameters.

    A copy has the module's parameters and buffers, in their shapes. The active adapter's copy replaces the module in
    forward. Only one active adapter may have a copy, since copies cannot be summed.

    Raises:
        AdapterError: in forward, more than one active adapter has a copy.
    """

    _tied_weights_keys: ClassVar = {"base_layer": "", "copies": ""}  # a copy of some parameters shares the others

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.copies = nn.ModuleDict().train(self.training)
        self._trained: dict[str, tuple[tuple[str, ...], bool]] = {}  # and whether the copy is whole

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
        trained, is_whole = tuple(originals if parameters is None else parameters), parameters is None
        # deepcopy takes these instead of copies, wherever the module has them: parameters tied within it stay tied.
        memo: dict[int, Any] = {id(parameter): parameter for parameter in originals.values()}
        memo |= {id(originals[key]): _trainable(originals[key], dtype) for key in trained}
        if not is_whole:  # buffers and submodules are the base's, which other modules of the adapter may stand around
            memo |= {id(part): part for part in (*self.base_layer.buffers(), *self.base_layer.children())}
        self.attach(name, SavedCopy(copy.deepcopy(self.base_layer, memo), trained, is_whole))

    def attach(self, name: str, record: SavedCopy) -> None:
        self.copies[name], self._trained[name] = record.module, (record.trained, record.is_whole)

    def detach(self, name: str) -> SavedCopy:
        self._deactivate(name)
        return SavedCopy(self.copies.pop(name), *self._trained.pop(name))

    def names(self) -> list[str]:
        return list(self._trained)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        return {key: self.copies[name].get_parameter(key) for key in self._trained[name][0]}

    def buffers_of(self, name: str) -> dict[str, Tensor]:
        """Return the buffers that belong to an adapter's copy and to its state, such as running statistics."""
        return buffers_in_state(self.copies[name]) if self._trained[name][1] else {}

    def in_file(self, name: str) -> dict[str, Tensor]:
        """Return an adapter's copy as PEFT's files hold it: with its buffers, and a tied parameter under each name."""
        if not self._trained[name][1]:
            return dict(self.parameters_of(name))
        return dict(self.copies[name].named_parameters(remove_duplicate=False)) | self.buffers_of(name)

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

    def current(self, key: str) -> Tensor:
        """Return a parameter of the base layer as forward uses it, for modules that share it."""
        return self._current().get_parameter(key)

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


def buffers_in_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a module's state_dict holds, name -> tensor of any shape."""
    buffers = {
        f"{path}.{name}" if path else name: (inner, name)
        for path, inner in module.named_modules()
        for name in inner._buffers
        if name not in inner._non_persistent_buffers_set
    }
    return {key: buffer for key, (inner, name) in buffers.items() if (buffer := inner._buffers[name]) is not None}


def _trainable(parameter: nn.Parameter, dtype: torch.dtype | None) -> nn.Parameter:
    """Return a copy of a parameter; only floating-point numbers are cast and can be trained."""
    is_float = parameter.is_floating_point()
    target = dtype if dtype is not None and is_float else parameter.dtype
    return nn.Parameter(parameter.detach().to(target, copy=True), requires_grad=is_float)
