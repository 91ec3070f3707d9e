"""An adapter's tensors as in PEFT's files: reading them from a model, writing them into one, and their shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ...layers import VARIANTS, AdaptedLayer, AdapterModule, LoRAParameter, SavedModule, TiedModule, Variant
from ..attach.placed import Placement
from ..attach.state import adapter_modules
from ..attach.targeting import unwrapped
from ..attach.ties import plain_path
from ..attach.wrappers import whole, write_into
from .names import BASE_LAYER, tensor_name


def file_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return an adapter's tensors, name in the file -> tensor in the shape that the file has (see `names`)."""
    named: dict[str, Tensor] = {}
    for path, module in _file_modules(model, name):
        tensors: dict[str, Tensor] = dict(module.parameters_of(name))
        if isinstance(module, SavedModule | TiedModule):
            tensors = module.in_file(name)
        variant = VARIANTS["plain"]
        if isinstance(module, AdaptedLayer):
            variant = module.adapters[name].variant
            tensors |= variant.file_tensors(module.adapters[name])
        for table, tensor in tensors.items():
            shape = _shape(module, variant, table, tuple(tensor.shape))
            named[tensor_name(path, table, variant)] = whole(tensor.detach()).view(shape)
    return named


def file_shapes(placements: Iterable[Placement]) -> dict[str, tuple[int, ...]]:
    """Return the trained tensors that an adapter's file must hold, name in the file -> shape."""
    placements = list(placements)
    paths = [path for path, _ in _with_file_paths([(p.path, p.module) for p in placements])]
    return {
        tensor_name(path, table, placement.variant): _shape(placement.module, placement.variant, table, shape)
        for path, placement in zip(paths, placements, strict=True)
        for table, shape in placement.shapes.items()
    }


def file_buffers(placements: Iterable[Placement]) -> dict[str, Tensor]:
    """Return the buffers that an adapter's file must hold, name in the file -> the base's buffer, of the same shape."""
    return {tensor_name(one.path, key): buffer for one in placements for key, buffer in one.buffers.items()}


def file_ties(placements: Iterable[Placement]) -> dict[str, str]:
    """Return the further names of tied parameters, which a file may hold: name in the file -> the trained one's."""
    return {tensor_name(one.path, key): tensor_name(*there) for one in placements for key, there in one.tied.items()}


@torch.no_grad()
def write_tensors(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
    """Copy a file's tensors, already checked, into an adapter of the model.

    Args:
        tensors: name in the file -> tensor in the shape of `file_shapes`.
    """
    for path, module in _file_modules(model, name):
        variant = module.adapters[name].variant if isinstance(module, AdaptedLayer) else VARIANTS["plain"]
        for table, parameter in module.parameters_of(name).items():
            write_into(parameter, tensors[tensor_name(path, table, variant)].view(parameter.shape))
        for key, buffer in module.buffers_of(name).items() if isinstance(module, SavedModule) else ():
            write_into(buffer, tensors[tensor_name(path, key)])


def _shape(module: AdapterModule, variant: Variant, table: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return variant.file_shape(module, table, shape) if isinstance(module, AdaptedLayer) else shape


def _file_modules(model: nn.Module, name: str) -> Iterator[tuple[str, AdapterModule]]:
    """Yield each module that holds an adapter, with the path of its tensors in the file."""
    modules = adapter_modules(model, name).items()
    return _with_file_paths([(plain_path(model, path), module) for path, module in modules])


def _with_file_paths(modules: list[tuple[str, AdapterModule]]) -> Iterator[tuple[str, AdapterModule]]:
    """Replace the path of each adapted module by the path of its tensors in the file."""
    adapted: dict[str, list[str]] = {}
    for path, module in modules:
        if isinstance(module, LoRAParameter):
            adapted.setdefault(path, []).append(module.parameter)
    for path, module in modules:
        depth = 0
        if isinstance(module, LoRAParameter):
            order = [name for name, _ in unwrapped(module).named_parameters(recurse=False) if name in adapted[path]]
            depth = len(order) - 1 - order.index(module.parameter)
        yield f"{path}{f'.{BASE_LAYER}' * depth}", module
