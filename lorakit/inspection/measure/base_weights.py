"""Reading base weights, one at a time, from a checkpoint folder, 16-bit or 4-bit, or from a model in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.attach.wrappers import find_module, named_modules, whole
from ...adapters.peft.fingerprint import check_checkpoint, check_trained_on
from ...adapters.peft.folder import AdapterFolder
from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.formats import StoredWeight
from ...checkpoints.prequantized import find_stored
from ...errors import CheckpointError, did_you_mean
from ...layers.adapted import AdaptedLayer
from ...layers.frozen.quantized_module import QuantizedModule
from ...models.pretrained import resolve_model
from .updates import LayerUpdate


class BaseWeights:
    """The weights under an adapter, by module path, as float32 matrices (out, in) in the update's orientation.

    Args:
        source: a checkpoint folder, 16-bit or 4-bit, a known model's name, or a model.

    Raises:
        CheckpointError: the folder is not a checkpoint, or it is broken.
    """

    def __init__(self, source: str | os.PathLike[str] | nn.Module) -> None:
        self._model = source if isinstance(source, nn.Module) else None
        self._checkpoint: Checkpoint | None = None
        self._stored: Mapping[str, StoredWeight] = {}
        if not isinstance(source, nn.Module):
            self._checkpoint = Checkpoint(resolve_model(source))
            self._stored = find_stored(self._checkpoint)
        self.name = type(source).__name__ if isinstance(source, nn.Module) else str(source)

    def weight(self, update: LayerUpdate, transposed: bool = False) -> Tensor | None:
        """Return the weight under an update, or None if it has no matrix of its own (experts, grouped convolutions).

        Args:
            transposed: whether square weights are stored as (in, out): PEFT's fan_in_fan_out.

        Raises:
            CheckpointError: there is no such weight (the message names the nearest), or it has another shape.
        """
        if update.kind == "experts":
            return None
        shape = update.low_rank.shape
        weight = self._adapted(update.path)
        if weight is None:
            weight = self.read(update.path).flatten(1)
            is_linear = update.kind == "linear"
            may_transpose = update.kind == "embedding" or (is_linear and (transposed or shape[0] != shape[1]))
            weight = weight.T if may_transpose and weight.shape == shape[::-1] else weight
        if update.kind == "conv" and weight.shape[0] == shape[0] and weight.shape[1] < shape[1]:
            return None
        if weight.shape != shape:
            raise CheckpointError(
                f"{self.name}: the weight of {update.path} is {tuple(weight.shape)}, the adapter's update is {shape}: "
                "this is not the adapter's base model"
            )
        return weight

    def check_base_of(self, adapter: AdapterFolder) -> None:
        """Raise CheckpointError if the adapter's file says that it was trained on another base."""
        if self._checkpoint is not None:
            check_checkpoint(self._checkpoint, adapter.base, adapter.layers, str(adapter.folder))
        elif self._model is not None:
            check_trained_on(self._model, adapter.metadata, adapter.layers, adapter.folder)

    def _adapted(self, path: str) -> Tensor | None:
        """Return the matrix (out, in) under a layer that is already adapted in the model in memory, else None."""
        layer = None if self._model is None else dict(named_modules(self._model)).get(path)
        return (
            layer.as_matrix(whole(layer.base_weight(torch.float32))).cpu() if isinstance(layer, AdaptedLayer) else None
        )

    def read(self, path: str) -> Tensor:
        """Return the weight of a module in the shape in which it is stored, fp32 on the CPU."""
        if self._checkpoint is None:
            assert self._model is not None
            return _module_weight(self._model, path)
        names = dict.fromkeys([*self._checkpoint.names, *self._stored])
        name = _nearest_name(f"{path}.weight", names)
        if name is None and path.endswith("lm_head") and self._checkpoint.config().get("tie_word_embeddings"):
            name = _nearest_name("embed_tokens.weight", names)
        if name is None:
            raise CheckpointError(f"{self.name}: there is no weight of {path}{did_you_mean(f'{path}.weight', names)}")
        if name not in self._stored:
            return self._checkpoint.read(name).float()
        stored = self._stored[name]
        return stored.assemble({part: self._checkpoint.read(part) for part in stored.parts}).dequantize(torch.float32)


def _nearest_name(name: str, names: Iterable[str]) -> str | None:
    """Find a tensor by its module's path; checkpoints and models may differ in the names before the first block."""
    known = set(names)
    suffix = name
    while suffix.count("."):
        if suffix in known:
            return suffix
        matches = [candidate for candidate in known if candidate.endswith(f".{suffix}")]
        if len(matches) == 1:
            return matches[0]
        suffix = suffix.partition(".")[2]
    return None


def _module_weight(model: nn.Module, path: str) -> Tensor:
    try:
        module: Any = find_module(model, path)
    except AttributeError:
        names = dict(named_modules(model))
        raise CheckpointError(f"the base model has no module {path}{did_you_mean(path, names)}") from None
    if isinstance(module, QuantizedModule):
        return module.quantized.dequantize(torch.float32).cpu()
    weight = whole(module.weight.detach())
    return weight.float().cpu()
