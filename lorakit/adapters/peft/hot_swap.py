"""`swap_adapter`: other values into an adapter that is attached, in place: nothing is allocated or compiled anew.

A server that keeps a fixed number of slots reads a new adapter into one of them between two batches. The parameters
stay where they are in memory, so that a compiled graph, a captured CUDA graph or an optimizer goes on with them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, listing
from ...layers import AdaptedLayer
from ..attach.state import check_adapter, lora_layers
from .folder import AdapterLayer, read_adapter_folder
from .names import tensor_name


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
            allotted; a shape, or what a variant trains beside A and B, does not fit. All are named, and nothing is
            changed.
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
    variant = layer.adapters[name].variant
    a, b = (tensor_name(path, table, variant) for table in layer.matrices)
    if a not in tensors or b not in tensors:
        return None
    names = {table: tensor_name(path, table, variant) for table in variant.trained}
    further = {table: tensors.pop(key) for table, key in names.items() if key in tensors}
    return AdapterLayer(
        path, "linear", tensors.pop(a), tensors.pop(b), layer.scaling[name], variant=variant, further=further
    )


def _fitted(layer: AdaptedLayer, name: str, given: AdapterLayer) -> list[tuple[nn.Parameter, Tensor]] | str:
    """Return each parameter with its new value, or what does not fit."""
    own = layer.parameters_of(name)
    (a, b), variant = (own[table] for table in layer.matrices), layer.adapters[name].variant
    if variant.kept:
        return "the adapter in place started away from the base, so that its matrices alone are not its update"
    if given.variant is not variant:
        has = f"has {given.variant.further}" if given.variant.trained else f"is {given.variant.title}"
        return f"it {has}, unlike the adapter in place"
    if given.further.keys() != set(variant.trained):
        return f"it has no {variant.further}, unlike the adapter in place"
    if len(given.lora_A) > len(a):
        return f"its rank {len(given.lora_A)} is larger than the {len(a)} allotted"
    if given.lora_A.shape[1:] != a.shape[1:] or given.lora_B.shape[:1] != b.shape[:1] or given.lora_B.dim() != b.dim():
        return (
            f"lora_A {tuple(given.lora_A.shape)} and lora_B {tuple(given.lora_B.shape)} do not fit "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    if given.lora_B.shape[1] != len(given.lora_A) or (given.experts > 1 and len(given.lora_A) != len(a)):
        return f"lora_A {tuple(given.lora_A.shape)} and lora_B {tuple(given.lora_B.shape)} do not multiply as here"
    tensors = [given.lora_A, given.lora_B, *given.further.values()]
    if not all(tensor.is_floating_point() and bool(torch.isfinite(tensor).all()) for tensor in tensors):
        return "it holds inf, nan, or numbers that are not of floating point"
    values = [
        (a, _widened(given.lora_A, 0, len(a))),
        (b, _widened(given.lora_B.float() * (given.scaling / layer.scaling[name]), 1, b.shape[1])),
    ]
    for table, tensor in given.further.items():
        if tensor.numel() != own[table].numel():
            return f"{table} has {tensor.numel()} numbers, expected {own[table].numel()}"
        values.append((own[table], tensor.reshape(own[table].shape)))
    return values


def _widened(matrix: Tensor, dim: int, size: int) -> Tensor:
    """Return a matrix with zeros after its end, up to `size` along one dimension."""
    missing = list(matrix.shape)
    missing[dim] = size - matrix.shape[dim]
    return torch.cat([matrix, matrix.new_zeros(missing)], dim)
