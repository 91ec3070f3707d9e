"""An adapter as a sequence of low-rank updates, from a folder or a live model. Every measure here reads these."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...adapters import lora_layers
from ...adapters.attach.state import adapter_configs, check_adapter
from ...adapters.attach.wrappers import whole
from ...adapters.low_rank import LowRank
from ...adapters.peft.folder import AdapterFolder, read_adapter_folder
from ...adapters.starts import changed_base_in_peft
from ...layers.adapted import AdaptedLayer
from .module_paths import in_model_order


@dataclass(frozen=True)
class LayerUpdate:
    """One layer's update, in float64.

    Attributes:
        name: the module path; for one expert among several, with [number] after it.
        path: the module path.
        kind: linear, embedding, conv or experts.
        rank, scaling: as allotted.
        parameters: number of parameters of A and B.
        low_rank: scaling·B·A.
        magnitude: the lengths of the tuned weight's rows, (out,), if the variant trains them as DoRA does, or None.
        is_whole: whether low_rank, with the magnitude, is the whole change of the weight.
    """

    name: str
    path: str
    kind: str
    rank: int
    scaling: float
    parameters: int
    low_rank: LowRank
    magnitude: Tensor | None
    is_whole: bool = True


class Updates:
    """The updates of one adapter, computed on demand.

    Args:
        source: an adapter folder, a run folder, or a model that carries an adapter.
        name: the adapter's, in a model.

    Raises:
        AdapterError: a model has no adapter of that name; or as `read_adapter_folder`.
        CheckpointError: as `read_adapter_folder`.
    """

    def __init__(self, source: str | os.PathLike[str] | nn.Module, name: str = "default") -> None:
        self.folder: AdapterFolder | None = None
        self._layers: dict[str, AdaptedLayer] = {}
        if isinstance(source, nn.Module):
            check_adapter(source, name)
            self._layers, self._name = lora_layers(source, name), name
            self.paths, self.source = list(self._layers), f"{type(source).__name__}, adapter {name}"
            self.config: dict[str, Any] = adapter_configs(source)[name].peft_values()
        else:
            self.folder = read_adapter_folder(source)
            self.paths, self.config = in_model_order(self.folder.layers), self.folder.config
            self.source = str(source)

    @property
    def changed_base(self) -> str | None:
        """The start ("pissa", ...) that moved part of the base into the adapter: B·A is not the whole change."""
        start = self.config.get("init_lora_weights")
        return start if changed_base_in_peft(start) and self.folder is not None else None

    def __getitem__(self, path: str) -> list[LayerUpdate]:
        """Return the updates of one module: one, or one per expert."""
        if self.folder is None:
            return _live_updates(path, self._layers[path], self._name)
        layer = self.folder.layers[path]
        parameters = (layer.lora_A.numel() + layer.lora_B.numel()) // layer.experts
        lengths, is_whole = layer.further.get(layer.variant.row_lengths or ""), layer.variant.is_factored
        magnitude = None if lengths is None else lengths.flatten().double()
        names = [path] if layer.experts == 1 else [f"{path}[{number}]" for number in range(layer.experts)]
        return [
            LayerUpdate(
                name, path, layer.kind, layer.rank, layer.scaling, parameters, layer.update(number), magnitude, is_whole
            )
            for number, name in enumerate(names)
        ]

    def __iter__(self) -> Iterator[LayerUpdate]:
        for path in self.paths:
            yield from self[path]


def _live_updates(path: str, layer: AdaptedLayer, name: str) -> list[LayerUpdate]:
    a, b = layer.lora_A[name], layer.lora_B[name]
    up, down = (whole(factor.detach()).cpu().double() for factor in layer.factors(name))
    variant = layer.adapters[name].variant
    lengths = layer.parameters_of(name).get(variant.row_lengths or "")
    magnitude = None if lengths is None else whole(lengths.detach()).cpu().flatten().double()
    kind = "embedding" if "embedding" in layer.matrices[0] else "conv" if a.ndim > 2 else "linear"
    if up.ndim == 2:
        updates = {path: LowRank(up, down)}
    else:
        kind = "experts"
        updates = {f"{path}[{number}]": LowRank(*pair) for number, pair in enumerate(zip(up, down, strict=True))}
    parameters = (a.numel() + b.numel()) // len(updates)
    rank = a.shape[0] // len(updates)
    return [
        LayerUpdate(label, path, kind, rank, layer.scaling[name], parameters, update, magnitude, variant.is_factored)
        for label, update in updates.items()
    ]
