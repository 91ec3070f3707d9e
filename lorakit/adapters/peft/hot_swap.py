"""`swap_adapter`: copy new values into an attached adapter in place; nothing is allocated or compiled again.

A server with a fixed number of slots reads a new adapter into one of them between two batches. The parameters keep
their memory, so a compiled graph, a captured CUDA graph or an optimizer can go on using them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, listing
from ...layers import AdaptedLayer
from ..attach.state import check_adapter, home_of, lora_layers
from ..attach.wrappers import write_into
from .folder import AdapterLayer, read_adapter_folder
from .names import tensor_name


def swap_adapter(model: nn.Module, name: str, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> None:
    """Replace the values of an attached adapter; its settings, rank, scaling, and its active and trained state stay.

    A smaller rank is padded with zeros. If the scaling differs, the ratio goes into B, so the update is the source's
    whatever the two configs say. An optimizer keeps its state, which belongs to the old values: make a new one to train
    further.

    Args:
        source: a PEFT folder, or tensors in the shapes and under the names of such a file: (r, in_features) and
            (out_features, r) for a linear layer. Tensors have the scaling of the attached adapter.

    Raises:
        AdapterError: there is no adapter of that name, or the source is not an adapter.
        CheckpointError: the source's layers are not the adapter's, a rank is larger than the adapter's, or a shape or a
            variant's further tensor does not fit. The message names every problem, and nothing is changed.
    """
    check_adapter(model, name)
    model = home_of(model, name)
    layers = lora_layers(model, name)
    problems: list[str] = []
    if isinstance(source, Mapping):
        where, tensors = "the tensors", dict(source)
        taken = {path: _take(tensors, path, layer, name) for path, layer in layers.items()}
        new = {path: layer for path, layer in taken.items() if layer is not None}
        problems += [f"{key} belongs to no layer of the adapter" for key in tensors]
    else:
        folder = read_adapter_folder(source)
        where, new = str(folder.folder), dict(folder.layers)
        problems += [f"{key} is not a low-rank matrix; it cannot be swapped" for key in folder.extras]
    problems += [f"{path} is missing" for path in layers if path not in new]
    problems += [f"{path} is not a layer of the adapter" for path in new if path not in layers]
    values: list[tuple[nn.Parameter, Tensor]] = []
    for path in [path for path in layers if path in new]:
        fitted = _fitted(layers[path], name, new[path])
        if isinstance(fitted, str):
            problems.append(f"{path}: {fitted}")
        else:
            values += fitted
    if problems:
        raise CheckpointError(f"{where} cannot take the place of adapter '{name}':{listing(problems)}")
    with torch.no_grad():
        for parameter, value in values:
            write_into(parameter, value)


def _take(tensors: dict[str, Tensor], path: str, layer: AdaptedLayer, name: str) -> AdapterLayer | None:
    """Remove a layer's tensors from a dictionary and return them; None if A or B is not among them."""
    variant = layer.adapters[name].variant
    a, b = (tensor_name(path, table, variant) for table in layer.matrices)
    if a not in tensors or b not in tensors:
        return None
    names = {table: tensor_name(path, table, variant) for table in variant.trained}
    further = {table: tensors.pop(key) for table, key in names.items() if key in tensors}
    return AdapterLayer(
        path, "linear", tensors.pop(a), tensors.pop(b), layer.scaling[name], variant=variant, further=further
    )


def _fitted(layer: AdaptedLayer, name: str, new: AdapterLayer) -> list[tuple[nn.Parameter, Tensor]] | str:
    """Return each parameter with its new value, or a description of the first misfit."""
    parameters = layer.parameters_of(name)
    (a, b), variant = (parameters[table] for table in layer.matrices), layer.adapters[name].variant
    if variant.kept:
        return "the adapter in place started away from the base, so that its matrices alone are not its update"
    if new.variant is not variant:
        has = f"has {new.variant.further}" if new.variant.trained else f"is {new.variant.title}"
        return f"it {has}, unlike the adapter in place"
    if new.further.keys() != set(variant.trained):
        return f"it has no {variant.further}, unlike the adapter in place"
    if len(new.lora_A) > len(a):
        return f"its rank {len(new.lora_A)} is larger than the {len(a)} allotted"
    if new.lora_A.shape[1:] != a.shape[1:] or new.lora_B.shape[:1] != b.shape[:1] or new.lora_B.dim() != b.dim():
        return (
            f"lora_A {tuple(new.lora_A.shape)} and lora_B {tuple(new.lora_B.shape)} do not fit "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    if new.lora_B.shape[1] != len(new.lora_A) or (new.experts > 1 and len(new.lora_A) != len(a)):
        return f"lora_A {tuple(new.lora_A.shape)} and lora_B {tuple(new.lora_B.shape)} do not multiply as here"
    tensors = [new.lora_A, new.lora_B, *new.further.values()]
    if not all(tensor.is_floating_point() and bool(torch.isfinite(tensor).all()) for tensor in tensors):
        return "it holds inf, nan, or numbers that are not floating point"
    wide = new.lora_B.to(torch.promote_types(new.lora_B.dtype, torch.float32))
    values = [
        (a, _padded(new.lora_A, 0, len(a))),
        (b, _padded(wide * (new.scaling / layer.scaling[name]), 1, b.shape[1])),
    ]
    for table, tensor in new.further.items():
        if tensor.numel() != parameters[table].numel():
            return f"{table} has {tensor.numel()} numbers, expected {parameters[table].numel()}"
        values.append((parameters[table], tensor.reshape(parameters[table].shape)))
    return values


def _padded(matrix: Tensor, dim: int, size: int) -> Tensor:
    """Return a matrix padded with zeros at its end to `size` along one dimension."""
    missing = list(matrix.shape)
    missing[dim] = size - matrix.shape[dim]
    return torch.cat([matrix, matrix.new_zeros(missing)], dim)
