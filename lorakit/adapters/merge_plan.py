"""Working out a merge: every new weight and the report, before anything in the model changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..layers import AdaptedLayer, Embedding4bit, Linear4bit, ResidualLinear4bit
from ..layers.quantized_module import QuantizedModule, frozen
from ..models.checkpoint import Checkpoint
from ..quantization import QuantizedWeight
from .attach import lora_layers
from .merge_base import Base, WrongBase, open_base, weight_from
from .merge_report import LEAST_SHARE, LayerMerge, MergeReport
from .merge_weights import MergedWeight, Update, least_rank, merged_4bit, merged_4bit_with_residual, merged_dense


@dataclass
class Swap:
    """One layer's exchange.

    Attributes:
        path: of the layer.
        layer: the adapted layer.
        old, new: its base layer before and after; the same module where only its weight is exchanged.
        weights: (before, after) in that case.
        parked: adapter name -> what the layer held of it, while the merge lasts.
    """

    path: str
    layer: AdaptedLayer
    old: nn.Module
    new: nn.Module
    weights: tuple[nn.Parameter, nn.Parameter] | None = None
    parked: dict[str, dict[str, Any]] = field(default_factory=dict)


@torch.no_grad()
def plan_merge(
    model: nn.Module, names: Sequence[str], base: Base, quantize: bool, residual_rank: int | None
) -> tuple[list[Swap], MergeReport]:
    """Compute the merged layers; arguments and errors as `merge_adapter`."""
    layers = {path: layer for path, layer in lora_layers(model).items() if set(names) & set(layer.names())}
    plan = _Plan(layers, tuple(names), quantize, residual_rank, _float_dtype(model))
    plan.check()
    source, notes = None, []
    if base is not None or any(isinstance(layer.base_layer, QuantizedModule) for layer in layers.values()):
        source = open_base(model, base)
    try:
        return plan.make(source, notes)
    except WrongBase as error:
        if base is not None:
            raise
        notes.append(f"not merged onto the checkpoint the model was loaded from: {error}")
        return plan.make(None, notes)


@dataclass(frozen=True)
class _Plan:
    layers: dict[str, AdaptedLayer]
    names: tuple[str, ...]
    quantize: bool
    residual_rank: int | None
    dtype: torch.dtype  # of what was in 4 bits and becomes dense

    def check(self) -> None:
        """Refuse what cannot be right, whatever the numbers."""
        for path, layer in self.layers.items():
            staying = [name for name in layer.names() if name not in self.names]
            for name in staying:
                if layer.variants[name].gain(layer, name, torch.float32) is not None:
                    raise AdapterError(
                        f"{path}: the adapter '{name}' scales the rows of the weight, and would scale the merged "
                        f"update too; merge it together with {', '.join(self.names)}, or remove it first"
                    )
            if self.quantize and isinstance(layer.base_layer, ResidualLinear4bit):
                raise AdapterError(
                    f"{path} holds the low-rank part of an earlier merge for good; it can be merged into with "
                    f"quantize=False only"
                )

    def make(self, source: Checkpoint | None, notes: list[str]) -> tuple[list[Swap], MergeReport]:
        """Compute all layers, onto the source's weights where there is one."""
        swaps, report = [], MergeReport(self.names, [], source and source.folder, notes)
        refused = []
        for path, layer in self.layers.items():
            update = Update.of(layer, [name for name in self.names if name in layer.names()])
            device = update.dense.device
            origin = None if source is None else weight_from(source, path, layer, device)
            merged, base = self._merged(path, layer, update, origin)
            swap = _swap(path, layer, merged)
            swaps.append(swap)
            before, after = _nbytes(layer.base_layer), merged.nbytes
            rank = merged.residual.rank if merged.residual else 0
            entry = LayerMerge.measure(path, merged.how, base, update.dense, merged.real, (before, after), rank)
            report.layers.append(entry)
            if self.residual_rank is not None and merged.limited and entry.share < LEAST_SHARE:
                refused.append(f"{path}: {entry.share:.3f}, needs rank {least_rank(update.low_rank, LEAST_SHARE)}")
        if refused:
            more = f"\n  (+{len(refused) - 10} more)" if len(refused) > 10 else ""
            raise AdapterError(
                f"less than {LEAST_SHARE} of the update would survive in 4 bits with residual_rank={self.residual_rank}:"
                "\n  " + "\n  ".join(refused[:10]) + more + "\nGive a 16-bit base, a higher residual_rank or "
                "quantize=False"
            )
        return swaps, report
