"""Which modules of a model share a parameter: what an adapter trains in one of them, the others have to follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from ...layers import AdapterModule
from .targeting import unwrapped
from .wrappers import inner_module


@dataclass(frozen=True)
class Holder:
    """A module of the base model that holds a parameter.

    Attributes:
        path: of the module, as if the model had no adapters.
        module: the module itself, without adapters.
        name: of the parameter in the module.
        inside: path of the adapter's module that the module is a part of, or "".
    """

    path: str
    module: nn.Module
    name: str
    inside: str


class Ties:
    """The parameters of a base model and all modules that hold each of them, in model order."""

    def __init__(self, model: nn.Module) -> None:
        self.main = input_embedding(model)
        self._holders: dict[int, list[Holder]] = {}
        for holder in _holders(model, "", "", set()):
            parameter = holder.module._parameters[holder.name]
            self._holders.setdefault(id(parameter), []).append(holder)

    def holders(self, parameter: nn.Parameter) -> list[Holder]:
        """Return all holders of a parameter."""
        return self._holders.get(id(parameter), [])

    def every(self) -> Iterator[Holder]:
        """Yield all holders of all parameters."""
        for holders in self._holders.values():
            yield from holders

    def outside(self, path: str, parameters: Mapping[str, nn.Parameter]) -> dict[str, list[tuple[str, Holder]]]:
        """Return who shares the parameters of the module at a path: path -> (name at `path`, holder) for each of them.

        Args:
            parameters: name in the module -> parameter.
        """
        found: dict[str, list[tuple[str, Holder]]] = {}
        for key, parameter in parameters.items():
            for holder in self.holders(parameter):
                if holder.path != path and not holder.path.startswith(f"{path}."):
                    found.setdefault(holder.path, []).append((key, holder))
        return found

    def source(self, path: str, module: nn.Module) -> str:
        """Return where the parameters of a module are trained if all who share them follow.

        It is the input embedding or the first module that has the same parameters and no other. So it is `path` itself
        for a module with submodules, or with a parameter of its own.
        """
        parameters = _own(module)
        if not parameters or not _is_leaf(module):
            return path
        ids = {id(parameter) for parameter in parameters}
        same = [
            holder
            for holder in self.holders(parameters[0])
            if not holder.inside and _is_leaf(holder.module) and {id(p) for p in _own(holder.module)} == ids
        ]
        same.sort(key=lambda holder: holder.module is not self.main)  # stable: otherwise the first in model order
        return same[0].path if same else path


def input_embedding(model: nn.Module) -> nn.Module | None:
    """Return a model's input embedding without adapters, if the model names it as those of transformers do."""
    return named_embedding(model, "get_input_embeddings")


def named_embedding(model: nn.Module, method: str) -> nn.Module | None:
    """Return the module without adapters that a method such as "get_output_embeddings" returns; None if it has none."""
    try:
        module = getattr(model, method, lambda: None)()
    except NotImplementedError:  # transformers' models of images, for instance
        return None
    return inner_module(unwrapped(inner_module(module))) if isinstance(module, nn.Module) else None


def plain_path(model: nn.Module, path: str) -> str:
    """Return the path of a module as if the model had no adapters: modules of adapters may stand around each other."""
    module, plain = inner_module(model), list[str]()
    for part in path.split(".") if path else ():
        plain += [] if isinstance(module, AdapterModule) and part == "base_layer" else [part]
        module = inner_module(module._modules[part])  # type: ignore[arg-type]
    return ".".join(plain)


def _own(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _holders(module: nn.Module, path: str, inside: str, seen: set[nn.Module]) -> Iterator[Holder]:
    module = inner_module(module)
    base = inner_module(unwrapped(module))
    if base in seen:  # one module in several places
        return
    seen.add(base)
    for name, parameter in base._parameters.items():
        if parameter is not None:  # a module may have the name and no parameter, as a linear layer without bias
            yield Holder(path, base, name, inside)
    inside = path if isinstance(module, AdapterModule) else inside
    for name, child in base.named_children():
        yield from _holders(child, f"{path}.{name}" if path else name, inside, seen)
