"""`merge_adapter` and `unmerge_adapter`: an adapter becomes part of the weights, and the weights come back to the bit.

A merge never writes to a weight. It computes all new weights, and only when the last of them is done puts them in the
place of the old, which are kept with the adapter's own matrices. So a merge that fails changes nothing, a weight that
something else shares (a tied embedding) stays what it was, and unmerging is putting back what was taken out.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from ..errors import AdapterError
from ..layers import AdaptedLayer
from ..models.config import DecoderConfig
from .attach import adapter_configs, check_adapter, lora_layers, replace_module
from .config import LoraConfig
from .merge_base import Base
from .merge_plan import Swap, plan_merge
from .merge_report import LEAST_SHARE, MergeReport


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
    _check_names(model, names)
    if earlier is not None:
        _check_reversal(model, earlier)
        _put_back(model, earlier)
    try:
        everything = (*(earlier.names if earlier else ()), *names)
        swaps, report = plan_merge(model, everything, base, quantize, residual_rank)
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
    _check_reversal(model, state)
    _put_back(model, state)


# ---- what is kept of a merge -----------------------------------------------------------------------------------------


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
    state.tied = _set_tied(model, False) if any(swap.parts for swap in state.swaps) else None
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
            device = next(swap.new.parameters()).device  # the model may have been moved since
            layer.base_layer = swap.old.train(swap.new.training).to(device)
        else:
            before, after = swap.weights
            before.data = before.data.to(after.device, after.dtype)
            swap.old.weight = before
        for name, tables in swap.parked.items():
            _unpark(layer, name, tables)
        swap.parked = {}
    adapter_configs(model).update(state.configs)
    if state.tied is not None:
        _set_tied(model, state.tied)
    del model.lora_merged


def _set_tied(model: nn.Module, value: bool) -> bool | None:
    """Set what the model's config says of a tied output head; return what it said, None where it says nothing."""
    config = getattr(model, "config", None)
    before: bool | None = getattr(config, "tie_word_embeddings", None)
    if isinstance(config, DecoderConfig):
        model.config = dataclasses.replace(config, tie_word_embeddings=value)  # type: ignore[assignment]
    elif before is not None:
        config.tie_word_embeddings = value  # type: ignore[union-attr]
    return before


def _check_names(model: nn.Module, names: Sequence[str]) -> None:
    merged = merged_state(model)
    if not names:
        raise AdapterError("no adapter is named; nothing to merge")
    for name in names:
        if merged is not None and name in merged.names and name not in adapter_configs(model):
            raise AdapterError(f"the adapter '{name}' is merged already; unmerge_adapter(model) takes it out again")
        check_adapter(model, name)


def _check_reversal(model: nn.Module, state: MergeState) -> None:
    if taken := [name for name in state.names if name in adapter_configs(model)]:
        raise AdapterError(
            f"the model has a new adapter of the name of a merged one, {_quoted(taken)}; remove it, and the merged one "
            "can come back"
        )
    present = set(model.modules())
    if gone := [swap.path for swap in state.swaps if swap.new not in present]:
        raise AdapterError(f"{gone[0]} is no longer the layer that was merged, so the merge cannot be undone")


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _park(layer: AdaptedLayer, name: str) -> dict[str, Any]:
    """Take an adapter off a layer; return all that the layer held of it, in whatever tables its variant has."""
    tables = {key: table for key, table in layer.named_children() if isinstance(table, nn.ParameterDict)}
    parameters = {key: table[name] for key, table in tables.items() if name in table}
    values = {
        key: table[name]
        for key, table in vars(layer).items()
        if key[0] != "_" and isinstance(table, dict) and name in table
    }
    is_active = name in layer.active
    layer.remove(name)
    return {"parameters": parameters, "values": values, "active": is_active}


def _unpark(layer: AdaptedLayer, name: str, parked: Mapping[str, Any]) -> None:
    for key, parameter in parked["parameters"].items():
        layer.table(key)[name] = parameter
    for key, value in parked["values"].items():
        getattr(layer, key)[name] = value
    layer.active += (name,) if parked["active"] else ()
