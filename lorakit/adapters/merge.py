"""`merge_adapter` and `unmerge_adapter`: an adapter becomes part of the weights, and the weights come back to the bit.

A merge never writes to a weight. It computes all new weights, and only when the last of them is done puts them in the
place of the old, which are kept with the adapter's own matrices. So a merge that fails changes nothing, a weight that
something else shares (a tied embedding) stays what it was, and unmerging is putting back what was taken out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import AdapterError, did_you_mean
from ..layers import AdaptedLayer, Embedding4bit, Linear4bit, ResidualLinear4bit
from ..layers.quantized_module import QuantizedModule, frozen
from ..models.checkpoint import Checkpoint
from ..quantization import QuantizedWeight
from .attach import adapter_configs, lora_layers
from .config import LoraConfig
from .merge_base import Base, WrongBase, open_base, weight_from
from .merge_report import LEAST_SHARE, LayerMerge, MergeReport
from .merge_weights import MergedWeight, Update, least_rank, merged_4bit, merged_4bit_with_residual, merged_dense


def merge_adapter(
    model: nn.Module,
    name: str | Sequence[str] = "default",
    base: Base = None,
    quantize: bool = False,
    residual_rank: int | None = None,
    reversible: bool = True,
) -> MergeReport:
    """Add an adapter's update, or the sum of several, to the weights of its layers, active or not.

    The adapter is no longer attached then; a layer that carries no other becomes a plain one. A layer in 16 or 32 bits
    keeps its dtype. A 4-bit layer becomes dense, unless `quantize` asks for 4 bits:

    =========  =================================  ==========================================================
    quantize   with a 16-bit base                 without
    =========  =================================  ==========================================================
    False      base + update                      dequantize(W) + update
    True       quantize(base + update)            4 bits, and the update as a low-rank part beside them
    =========  =================================  ==========================================================

    Merging onto adapters that are merged already merges them all anew, from the original weights: the order makes no
    difference.

    Args:
        base: folder or known name of the 16-bit checkpoint that a 4-bit model was quantized from; None: the folder the
            model was loaded from, if the weights are there; False: none.
        quantize: leave 4-bit layers in 4 bits, each in its own format.
        residual_rank: most columns of the low-rank part that is kept beside 4 bits; None: as many as the update has,
            which keeps all of it.
        reversible: keep what `unmerge_adapter` needs, which is the original weights.

    Returns:
        For each layer how much of the update survived. A warning is issued where that is less than 0.95.

    Raises:
        AdapterError: there is no such adapter, or it is merged already; a merged weight would hold inf or nan; less
            than 0.95 of an update would survive beside 4 bits at the residual_rank given; or merging would change what
            another adapter means. The model is unchanged.
        CheckpointError: the base that was named is missing, malformed, or not what the model was made from.
    """
    names = (name,) if isinstance(name, str) else tuple(dict.fromkeys(name))
    earlier = merged_state(model)
    _check_names(model, names, earlier)
    if earlier is not None:
        _put_back(model, earlier)
    try:
        everything = (*(earlier.names if earlier else ()), *names)
        swaps, report = _planned(model, everything, base, Wanted(quantize, residual_rank))
    except BaseException:
        if earlier is not None:
            _put_in(model, earlier)
        raise
    _put_in(model, MergeState(everything, swaps))
    if not reversible:
        del model.lora_merged
    if report.warnings:
        least = min(layer.share for layer in report.layers)
        warnings.warn(
            f"in {len(report.warnings)} of {len(report.layers)} layers less than {LEAST_SHARE} of the update survived "
            f"the merge (least: {least:.3f}); print the report",
            stacklevel=2,
        )
    return report


def unmerge_adapter(model: nn.Module) -> None:
    """Undo all merges: the weights are the very tensors they were, and the adapters are attached again, as they were.

    Raises:
        AdapterError: nothing is merged, or it was with reversible=False; a merged layer is no longer in the model; or a
            new adapter has taken the name of a merged one. The model is unchanged.
    """
    state = merged_state(model)
    if state is None:
        raise AdapterError("nothing is merged into this model that could be undone")
    if taken := [name for name in state.names if name in adapter_configs(model)]:
        raise AdapterError(f"the model has a new adapter {_quoted(taken)}; remove it before the merged one comes back")
    present = set(model.modules())
    if gone := [swap.path for swap in state.swaps if swap.new not in present]:
        raise AdapterError(f"{gone[0]} is not the layer that was merged; it was replaced since, nothing is undone")
    _put_back(model, state)


# ---- what is kept of a merge -----------------------------------------------------------------------------------------


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


@dataclass
class MergeState:
    """What a model remembers of its merges, as `model.lora_merged`; `unmerge_adapter` goes by it.

    Attributes:
        names: of the merged adapters.
        swaps: what was exchanged.
        configs: of the merged adapters.
        tied: what the model's config said of tied embeddings, where a merge parted the output head from them.
    """

    names: tuple[str, ...]
    swaps: list[Swap]
    configs: dict[str, LoraConfig] = field(default_factory=dict)
    tied: bool | None = None


def merged_state(model: nn.Module) -> MergeState | None:
    """Return what is merged into a model, or None."""
    return cast("MergeState | None", getattr(model, "lora_merged", None))


def _put_in(model: nn.Module, state: MergeState) -> None:
    """Exchange the weights and take the adapters off; nothing here can fail."""
    for swap in state.swaps:
        swap.parked = {name: _park(swap.layer, name) for name in state.names if name in swap.layer.names()}
        if swap.weights is None:
            swap.layer.base_layer = swap.new
        else:
            swap.new.weight = swap.weights[1]
        if not swap.layer.names():
            replace_module(model, swap.layer, swap.new)
    configs = adapter_configs(model)
    state.configs = {name: configs.pop(name) for name in state.names}
    model.lora_merged = state  # type: ignore[assignment]


def _put_back(model: nn.Module, state: MergeState) -> None:
    """Reverse `_put_in`, also where adapters were attached to the merged layers since."""
    hosts = {layer.base_layer: layer for layer in lora_layers(model).values()}
    for swap in state.swaps:
        layer = hosts.get(swap.new)
        if layer is None:
            layer = swap.layer.train(swap.new.training)
            replace_module(model, swap.new, layer)
        if swap.weights is None:
            layer.base_layer = swap.old.train(swap.new.training)
        else:
            swap.old.weight = swap.weights[0]
        for name, tables in swap.parked.items():
            _unpark(layer, name, tables)
        swap.parked = {}
    adapter_configs(model).update(state.configs)
    del model.lora_merged


def _park(layer: AdaptedLayer, name: str) -> dict[str, Any]:
    """Take an adapter off a layer; return all that the layer held of it, in whatever tables its variant has."""
    parameters = {key: table[name] for key, table in layer.named_children() if _holds(table, name)}
    values = {key: table[name] for key, table in vars(layer).items() if key[0] != "_" and _holds(table, name)}
    is_active = name in layer.active
    layer.remove(name)
    return {"parameters": parameters, "values": values, "active": is_active}


def _unpark(layer: AdaptedLayer, name: str, parked: Mapping[str, Any]) -> None:
    for key, parameter in parked["parameters"].items():
        layer.table(key)[name] = parameter
    for key, value in parked["values"].items():
        getattr(layer, key)[name] = value
    layer.active += (name,) if parked["active"] else ()


def _holds(table: object, name: str) -> bool:
    return isinstance(table, dict | nn.ParameterDict) and name in table
