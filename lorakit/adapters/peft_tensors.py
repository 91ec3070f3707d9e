"""An adapter's tensors as PEFT's files hold them: out of a model, into a model, and the shapes expected."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ..layers import AdapterPart, LoRAConv, LoRALinear, LoRAParameter
from .attach import adapter_parts
from .peft_names import BASE_LAYER, tensor_name
from .placing import Placement
from .targeting import unwrapped


def file_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return an adapter's tensors as a file has them, name in the file -> tensor; they share the parameters' memory."""
    found: dict[str, Tensor] = {}
    parts = [(_logical(path, part), part) for path, part in adapter_parts(model, name).items()]
    for path, part in _with_file_paths(parts):
        for table, parameter in part.parameters_of(name).items():
            shape = _shape(part, table, tuple(parameter.shape))
            found[tensor_name(path, table)] = parameter.detach().view(shape)
        if isinstance(part, LoRALinear) and part.adapters[name].variant.kept:  # a start inside the base: twice the rank
            up, down = part.factors(name)
            found[tensor_name(path, "lora_A")] = down.detach()
            found[tensor_name(path, "lora_B")] = up.detach() / part.scaling[name]
    return found


def file_shapes(placements: Iterable[Placement]) -> dict[str, tuple[int, ...]]:
    """Return what a file of an adapter has to hold, name in the file -> shape."""
    placements = list(placements)
    paths = [path for path, _ in _with_file_paths([(p.path, p.part) for p in placements])]
    return {
        tensor_name(path, table): _shape(placement.part, table, shape)
        for path, placement in zip(paths, placements, strict=True)
        for table, shape in placement.shapes.items()
    }


@torch.no_grad()
def write_tensors(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
    """Copy a file's tensors, which have been checked, into an adapter of the model."""
    for key, parameter in file_tensors(model, name).items():
        parameter.copy_(tensors[key])


def _shape(part: AdapterPart, table: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(part, LoRAConv) and table == "lora_magnitude_vector":
        return (1, *shape, *(1 for _ in part.kernel[1:]))
    return shape


def _with_file_paths(parts: list[tuple[str, AdapterPart]]) -> Iterator[tuple[str, AdapterPart]]:
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


def _logical(path: str, part: AdapterPart) -> str:
    """The path of the module that a part adapts; a parameter's part may be inside another one's."""
    while isinstance(part, LoRAParameter) and path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path
