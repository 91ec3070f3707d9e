"""`swap_adapter`: other values into an adapter that is attached, in place: nothing is allocated or compiled anew.

A server that keeps a fixed number of slots reads a new adapter into one of them between two batches. The parameters
stay where they are in memory, so that a compiled graph, a captured CUDA graph or an optimizer goes on with them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, listing
from ..layers import AdaptedLayer
from .adapter_folder import AdapterLayer, read_adapter_folder
from .peft_names import tensor_name
from .state import check_adapter, lora_layers


def swap_adapter(model: nn.Module, name: str, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> None:
    """Replace the values of an attached adapter; its settings, rank and scaling, and what is active or trained, stay.

    A smaller rank is filled up with zeros. A scaling that differs is multiplied into B, so that the update is the
    source's whatever the two configs say. An optimizer keeps its state, which is that of the values before: to train
    on, make a new one.

    Args:
        source: a PEFT folder; or tensors by their names in such a file, scaled as the adapter in place is.

    Raises:
        AdapterError: there is no adapter of that name, or the source is not an adapter.
        CheckpointError: the source has layers that the adapter has not, or lacks some; a rank is larger than the one
            allotted; a shape, a magnitude or another tensor does not fit. All are named, and nothing is changed.
    """
    check_adapter(model, name)
    layers = lora_layers(model, name)
    problems: list[str] = []
    if isinstance(source, Mapping):
        where, tensors = "the tensors", dict(source)
        found = {path: _take(tensors, path, layer, name) for path, layer in layers.items()}
        given = {path: layer for path, layer in found.items() if layer is not None}
        problems += [f"{key} belongs to no layer of the adapter" for key in tensors]
    else:
        folder = read_adapter_folder(source)
        where, given = str(folder.folder), dict(folder.layers)
        problems += [f"{key} is not a low-rank matrix; it cannot be swapped" for key in folder.extras]
    problems += [f"{path} is missing" for path in layers if path not in given]
    problems += [f"{path} is not a layer of the adapter" for path in given if path not in layers]
    values: list[tuple[nn.Parameter, Tensor]] = []
    for path in [path for path in layers if path in given]:
        fitted = _fitted(layers[path], name, given[path])
        if isinstance(fitted, str):
            problems.append(f"{path}: {fitted}")
        else:
            values += fitted
    if problems:
        raise CheckpointError(f"{where} cannot take the place of adapter '{name}':{listing(problems)}")
    with torch.no_grad():
        for parameter, value in values:
            parameter.copy_(value)


def _take(tensors: dict[str, Tensor], path: str, layer: AdaptedLayer, name: str) -> AdapterLayer | None:
    """Take a layer's tensors out of a dictionary; None where A or B is not among them."""
    a, b = (tensor_name(path, table) for table in layer.matrices)
    if a not in tensors or b not in tensors:
        return None
    magnitude = tensors.pop(tensor_name(path, "lora_magnitude_vector"), None)
    return AdapterLayer(path, "linear", tensors.pop(a), tensors.pop(b), layer.scaling[name], magnitude)


def _fitted(layer: AdaptedLayer, name: str, given: AdapterLayer) -> list[tuple[nn.Parameter, Tensor]] | str:
    """Return each parameter with its new value, or what does not fit."""
    own = layer.parameters_of(name)
    (a, b), magnitude = (own[table] for table in layer.matrices), own.get("lora_magnitude_vector")
    if layer.adapters[name].variant.kept:
        return "the adapter in place started away from the base, so that its matrices alone are not its update"
    if given.bias is not None:
        return "it has a bias on lora_B, which the adapter in place has not"
    if (given.magnitude is None) != (magnitude is None):
        return f"it has {'no ' if given.magnitude is None else ''}magnitudes (DoRA), unlike the adapter in place"
    if len(given.lora_A) > len(a):
        return f"its rank {len(given.lora_A)} is larger than the {len(a)} allotted"
    if given.lora_A.shape[1:] != a.shape[1:] or given.lora_B.shape[:1] != b.shape[:1] or given.lora_B.dim() != b.dim():
        return (
            f"lora_A {tuple(given.lora_A.shape)} and lora_B {tuple(given.lora_B.shape)} do not fit "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    if given.lora_B.shape[1] != len(given.lora_A) or (given.experts > 1 and len(given.lora_A) != len(a)):
        return f"lora_A {tuple(given.lora_A.shape)} and lora_B {tuple(given.lora_B.shape)} do not multiply as here"
    tensors = [given.lora_A, given.lora_B, *([] if given.magnitude is None else [given.magnitude])]
    if not all(tensor.is_floating_point() and bool(torch.isfinite(tensor).all()) for tensor in tensors):
        return "it holds inf, nan, or numbers that are not of floating point"
    values = [
        (a, _widened(given.lora_A, 0, len(a))),
        (b, _widened(given.lora_B.float() * (given.scaling / layer.scaling[name]), 1, b.shape[1])),
    ]
    if magnitude is not None and given.magnitude is not None:
        if given.magnitude.numel() != magnitude.numel():
            return f"it has {given.magnitude.numel()} magnitudes, expected {magnitude.numel()}"
        values.append((magnitude, given.magnitude.reshape(magnitude.shape)))
    return values


def _widened(matrix: Tensor, dim: int, size: int) -> Tensor:
    """Return a matrix with zeros after its end, up to `size` along one dimension."""
    missing = list(matrix.shape)
    missing[dim] = size - matrix.shape[dim]
    return torch.cat([matrix, matrix.new_zeros(missing)], dim)
