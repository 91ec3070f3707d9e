"""`TiedModule`: a module that shares a parameter with one that an adapter trains, and goes on sharing it.

An output head shares the embedding's table, an encoder and a decoder share one table. While an adapter trains a copy of
the table, or some of its rows, the modules that share it compute with the trained values too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from .adapter_module import AdapterModule
from .saved_module import SavedModule
from .trained_tokens import TrainedTokens

# Name of a parameter of a module -> the other module that trains it, and its name there.
Sources = Mapping[str, tuple[SavedModule | TrainedTokens, str]]


@dataclass(frozen=True)
class FollowedParameters:
    """The record of one adapter on a `TiedModule`; nothing is trained here."""

    sources: Sources


class TiedModule(AdapterModule):
    """A frozen module that computes with the trained values of the parameters that it shares with another module.

    The values have the shapes of its own parameters.

    Raises:
        AdapterError: in forward, an active adapter of another kind changes this module as well.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self._followed: dict[str, FollowedParameters] = {}  # in a dict, the sources are no children of this module

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return an empty mapping: nothing is trained here."""
        return {}

    def add(self, name: str, sources: Sources) -> None:
        """Use the sources' parameters while this adapter is active."""
        self.attach(name, FollowedParameters(sources))

    def attach(self, name: str, record: FollowedParameters) -> None:
        self._followed[name] = record

    def detach(self, name: str) -> FollowedParameters:
        self._deactivate(name)
        return self._followed.pop(name)

    def names(self) -> list[str]:
        return list(self._followed)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        return {}

    def sources(self, name: str) -> Sources:
        """Return what an adapter trains elsewhere: name of a parameter here -> the module and the name there."""
        return self._followed[name].sources

    def in_file(self, name: str) -> dict[str, Tensor]:
        """Return what PEFT's files hold of an adapter here: copies under this module's names too, but not rows."""
        sources = self.sources(name).items()
        return {k: one.parameters_of(name)[there] for k, (one, there) in sources if isinstance(one, SavedModule)}

    def followed(self) -> dict[str, Tensor]:
        """Return the parameters that forward takes from elsewhere, in the dtypes that they have here."""
        own, taken = _base_of(self)._parameters, dict[str, Tensor]()
        for name in self.active:
            for key, (source, there) in self.sources(name).items():
                if key not in taken:
                    taken[key] = source.current(there).to(cast(Tensor, own[key]).dtype)
        return taken

    @property
    def weight(self) -> Tensor:
        """The weight that forward uses, for models that read it."""
        weight = self.followed().get("weight")
        return cast(Tensor, _base_of(self).weight) if weight is None else weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.base_layer(*args, **kwargs)
        if isinstance(self.base_layer, AdapterModule) and self.base_layer.active:
            raise AdapterError(
                f"adapters {', '.join((*self.base_layer.active, *self.active))} change one module in ways that have no "
                "sum: a layer of its own, and a weight that it shares; only one can be active"
            )
        return torch.func.functional_call(_base_of(self), self.followed(), args, kwargs)


def _base_of(module: nn.Module) -> nn.Module:
    """Return the module around which all adapters' modules stand."""
    while isinstance(module, AdapterModule):
        module = module.base_layer
    return module
