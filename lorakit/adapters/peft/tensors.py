"""An adapter's tensors as PEFT's files hold them: out of a model, into a model, and the shapes expected."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ...layers import VARIANTS, AdaptedLayer, AdapterModule, LoRAParameter, Variant
from ..attach.add import adapter_modules
from ..attach.placement import Placement
from ..attach.targeting import unwrapped
from .names import BASE_LAYER, tensor_name


def file_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return an adapter's tensors as a file has them, name in the file -> tensor."""
    found: dict[str, Tensor] = {}
    for path, part in _file_parts(model, name):
        tensors: dict[str, Tensor] = dict(part.parameters_of(name))
        variant = VARIANTS["plain"]
        if isinstance(part, AdaptedLayer):
            variant = part.adapters[name].variant
            tensors |= variant.file_tensors(part.adapters[name])
        for table, tensor in tensors.items():
            shape = _shape(part, variant, table, tuple(tensor.shape))
            found[tensor_name(path, table, variant)] = tensor.detach().view(shape)
    return found


def file_shapes(placements: Iterable[Placement]) -> dict[str, tuple[int, ...]]:
    """Return what a file of an adapter has to hold, name in the file -> shape."""
    placements = list(placements)
    paths = [path for path, _ in _with_file_paths([(p.path, p.module) for p in placements])]
    return {
        tensor_name(path, table, placement.variant): _shape(placement.module, placement.variant, table, shape)
        for path, placement in zip(paths, placements, strict=True)
        for table, shape in placement.shapes.items()
    }


@torch.no_grad()
def write_tensors(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
    """Copy a file's tensors, which have been checked, into an adapter of the model."""
    for path, part in _file_parts(model, name):
        variant = part.adapters[name].variant if isinstance(part, AdaptedLayer) else VARIANTS["plain"]
        for table, parameter in part.parameters_of(name).items():
            parameter.copy_(tensors[tensor_name(path, table, variant)].view(parameter.shape))


def _shape(part: AdapterModule, variant: Variant, table: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return variant.file_shape(part, table, shape) if isinstance(part, AdaptedLayer) else shape


def _file_parts(model: nn.Module, name: str) -> Iterator[tuple[str, AdapterModule]]:
    """Yield each part of an adapter with the path that its tensors have in the file."""
    return _with_file_paths([(_logical(path, part), part) for path, part in adapter_modules(model, name).items()])


def _with_file_paths(parts: list[tuple[str, AdapterModule]]) -> Iterator[tuple[str, AdapterModule]]:
    """Give each part of an adapter, by the path of its module, the path that its tensors have in the file."""
    adapted: dict[str, list[str]] = {}
    for path, part in parts:
        if isinstance(part, LoRAParameter):
            adapted.setdefault(path, []).append(part.parameter)
    for path, part in parts:
        depth = 0
        if isinstance(part, LoRAParameter):
            order = [name for name, _ in unwrapped(part).named_parameters(recurse=False) if name in adapted[path]]
            depth = len(order) - 1 - order.index(part.parameter)
        yield f"{path}{f'.{BASE_LAYER}' * depth}", part


def _logical(path: str, part: AdapterModule) -> str:
    """The path of the module that a part adapts; a parameter's part may be inside another one's."""
    while isinstance(part, LoRAParameter) and path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path
