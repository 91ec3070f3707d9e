"""Reading an adapter's updates from a model or a folder, and making a new adapter from updates.

An adapter with anything besides low-rank updates is refused, because sums and ranks have no meaning for the rest. A new
adapter has a scaling of 1 in every layer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import AdapterError
from ..attach.add import add_adapter
from ..attach.state import adapter_modules, check_adapter, home_of, lora_layers
from ..attach.wrappers import whole
from ..low_rank import LowRank
from ..peft.config import attachable_config
from ..peft.folder import AdapterLayer, read_adapter_folder, write_adapter_folder
from ..peft.names import BASE_KEY, CONFIG_FILE, matrix_names
from .ranks import config_for_ranks, rank_pattern

_INHERITED = ("base_model_name_or_path", "fan_in_fan_out", "revision", "task_type")


def model_updates(model: nn.Module, name: str) -> dict[str, LowRank]:
    """Return module path -> update (out_features, in_features) of an attached adapter, in the dtype of its A and B.

    Raises:
        AdapterError: there is no such adapter, or it holds more than low-rank updates.
    """
    check_adapter(model, name)
    model = home_of(model, name)
    layers = lora_layers(model, name)
    where = f"adapter '{name}'"
    if others := [path for path in adapter_modules(model, name) if path not in layers]:
        raise AdapterError(f"{where} holds more than low-rank updates: {', '.join(others[:5])}")
    updates = {}
    for path, layer in layers.items():
        variant = layer.adapters[name].variant
        if variant.multiplies_base:
            raise AdapterError(f"{where} {variant.not_low_rank}")
        in_factors = {*layer.matrices, *(variant.trained if variant.is_low_rank else ())}
        if extras := sorted(layer.parameters_of(name).keys() - in_factors):
            raise AdapterError(f"{where} holds more than low-rank updates: {', '.join(extras)} of {path}")
        up, down = (whole(factor.detach()) for factor in layer.factors(name))
        if up.ndim != 2:
            raise AdapterError(f"{where} adapts {path}, which holds several matrices; such updates cannot be combined")
        updates[path] = LowRank(up, down)
    return updates


def attach_updates(model: nn.Module, updates: Mapping[str, LowRank], name: str, dtype: torch.dtype) -> None:
    """Attach an adapter that consists of these updates and make it active, as `add_adapter` does.

    Raises:
        AdapterError: the name is taken or not usable, or no update is left to attach. The model is then unchanged.
    """
    add_adapter(model, config_for_ranks(ranks_of(updates)), name, dtype)
    with torch.no_grad():
        for path, layer in lora_layers(home_of(model, name), name).items():
            update = updates[path]
            layer.lora_A[name].copy_(update.down.reshape(layer.lora_A[name].shape))
            layer.lora_B[name].copy_(update.up.reshape(layer.lora_B[name].shape))


class FolderUpdates(Mapping[str, LowRank]):
    """Module path -> update of an adapter on disk; each access reads the file.

    Updates are (out, in), of an embedding (dim, vocab), of a convolution (out, in·kernel), in float32, or in float64 if
    the file has that.

    Attributes:
        adapter: the opened folder.

    Raises:
        AdapterError: the adapter holds more than low-rank updates, or its start changed the base.
        CheckpointError: as `read_adapter_folder`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.adapter = read_adapter_folder(path)
        where = self.adapter.folder
        config = attachable_config(self.adapter.config, where / CONFIG_FILE)  # refuses starts that changed the base
        if not config.update_variant.is_low_rank:
            raise AdapterError(f"{where} {config.update_variant.not_low_rank}")
        if self.adapter.extras:
            names = ", ".join(list(self.adapter.extras)[:5])
            raise AdapterError(f"{where} holds more than low-rank updates: {names}")
        if config.target_parameters:
            raise AdapterError(f"{where} adapts parameters that hold several matrices; such updates cannot be combined")

    def __getitem__(self, path: str) -> LowRank:
        layer = self.adapter.layers[path]
        where = f"{self.adapter.folder}: {path}"
        if layer.kind == "conv" and layer.lora_B.shape[1] != layer.lora_A.shape[0]:
            raise AdapterError(f"{where} is a grouped convolution with several updates; these cannot be combined")
        return layer.update(dtype=torch.promote_types(layer.lora_A.dtype, torch.float32))

    def __contains__(self, path: object) -> bool:
        return path in self.adapter.layers  # reads no tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.adapter.layers)

    def __len__(self) -> int:
        return len(self.adapter.layers)


def write_updates(
    path: str | os.PathLike[str],
    updates: Mapping[str, LowRank],
    sources: Sequence[FolderUpdates],
    dtype: torch.dtype,
) -> Path:
    """Write a PEFT folder of updates that come from the layers of `sources`, completely or not at all.

    Raises:
        AdapterError: no update is left to write, or the folder holds something that is not an adapter.
        StorageError: writing failed; whatever was at `path` is untouched.
    """
    ranks = ranks_of(updates)
    config = config_for_ranks(ranks).peft_values()
    r, pattern = rank_pattern(ranks)
    first = sources[0].adapter.config
    config |= {"lora_alpha": r, "alpha_pattern": pattern}  # whole numbers
    config |= {key: first[key] for key in _INHERITED if key in first}
    config |= {"peft_type": "LORA", "inference_mode": True, "init_lora_weights": True}
    tensors: dict[str, Tensor] = {}
    for module_path, update in updates.items():
        if update.rank:
            layers = next(source.adapter.layers for source in sources if module_path in source)
            tensors |= _tensors(update, layers[module_path], dtype)
    metadata: dict[str, str] = {}
    for source in reversed(sources):  # the first one decides
        metadata |= source.adapter.metadata
    return write_adapter_folder(path, tensors, config, metadata)


def check_one_base(sources: Sequence[FolderUpdates]) -> None:
    """Raise AdapterError if two adapters were trained on different base models."""
    known = [(source.adapter.folder, base, set(source)) for source in sources if (base := source.adapter.base)]
    for folder, base, paths in known[1:]:
        first, first_base, first_paths = known[0]
        if not first_base.is_of(base, first_paths | paths):
            raise AdapterError(f"these adapters are of different base models: {first} and {folder}")
    old = {key: source.adapter.folder for source in sources if (key := source.adapter.metadata.get(BASE_KEY))}
    if len(old) > 1:
        raise AdapterError(f"these adapters are of different base models: {' and '.join(map(str, old.values()))}")


def ranks_of(updates: Mapping[str, LowRank]) -> dict[str, int]:
    """Return module path -> rank."""
    return {path: update.rank for path, update in updates.items()}


def _tensors(update: LowRank, like: AdapterLayer, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a layer's tensors under PEFT's names, in the shapes of `like` but for the rank."""
    down = update.down.reshape(update.rank, *like.lora_A.shape[1:])
    up = update.up.reshape(like.lora_B.shape[0], update.rank, *like.lora_B.shape[2:])
    names = matrix_names(like.path, like.kind == "embedding")
    return {name: matrix.to("cpu", dtype).contiguous() for name, matrix in zip(names, (down, up), strict=True)}
