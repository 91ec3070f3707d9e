"""Applying a merge to a model and undoing it: both exchange objects and never write numbers.

The merge keeps the adapted layers, their old weights and the adapters' matrices. Undoing it puts the same objects back,
so every byte is as before.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from ...errors import AdapterError
from ...layers import AdapterModule
from ...models.decoder.config import DecoderConfig
from ..attach.state import (
    AdapterRecord,
    adapter_configs,
    adapter_modules,
    forget_adapter,
    recall_adapter,
    replace_module,
)


@dataclass
class Exchange:
    """One parameter or buffer that takes the place of another: `module.name` was `before` and becomes `after`."""

    module: nn.Module
    name: str
    before: Tensor | None
    after: Tensor


@dataclass
class Swap:
    """The changes of a merge to one module with adapters.

    Attributes:
        path: of the module.
        module: the module with the adapters.
        old, new: its base layer before and after; the same module unless it was in 4 bits.
        exchanges: the parameters that change.
        parked: adapter name -> the record that the module had of it, while the merge lasts.
    """

    path: str
    module: AdapterModule
    old: nn.Module
    new: nn.Module
    exchanges: list[Exchange] = field(default_factory=list)
    parked: dict[str, Any] = field(default_factory=dict)


@dataclass
class MergeState:
    """A model's record of its merges, kept as `model.lora_merged`.

    Attributes:
        names: of the merged adapters.
        swaps: the changes, in model order.
        unties: whether the model's setting `tie_word_embeddings` becomes false.
        parted: exchanges of shared parameters for copies, beside the swaps.
        records: adapter name -> its entry in the model's record of adapters.
        tied: the earlier value of the model config's `tie_word_embeddings`, if the merge changed it.
    """

    names: tuple[str, ...]
    swaps: list[Swap]
    unties: bool
    parted: list[Exchange] = field(default_factory=list)
    records: dict[str, AdapterRecord] = field(default_factory=dict)
    tied: bool | None = None


def merged_state(home: nn.Module) -> MergeState | None:
    """Return the record of merges on this very module, or None."""
    return cast("MergeState | None", vars(home).get("lora_merged"))


def apply_merge(model: nn.Module, merge: MergeState) -> None:
    """Put the merged weights in their places and detach the adapters; nothing here can fail."""
    for swap in merge.swaps:
        module = swap.module
        module.forget_base()
        swap.parked = {name: module.detach(name) for name in merge.names if name in module.names()}
        module.base_layer = swap.new
        for exchange in swap.exchanges:
            setattr(exchange.module, exchange.name, exchange.after)
        if not module.names():
            replace_module(model, module, swap.new)
    for exchange in merge.parted:
        setattr(exchange.module, exchange.name, exchange.after)
    merge.records = {name: forget_adapter(model, name) for name in merge.names}
    merge.tied = _set_tied(model, False) if merge.unties else None
    model.lora_merged = merge  # type: ignore[assignment]


def undo_merge(model: nn.Module, merge: MergeState) -> None:
    """Reverse `apply_merge`, even if adapters were attached to the merged layers since; call `check_reversal` first."""
    for exchange in merge.parted:
        _catch_up_with(exchange)
        setattr(exchange.module, exchange.name, exchange.before)
    for swap in reversed(merge.swaps):  # of modules around each other, the inner one first
        module = _current_module(model, swap)
        if module is None:
            module = swap.module
            replace_module(model, swap.new, module)
        swap.module = module
        _catch_up(swap)
        module.base_layer = swap.old
        for exchange in swap.exchanges:
            setattr(exchange.module, exchange.name, exchange.before)
        module.forget_base()
        for name, parked in swap.parked.items():
            module.attach(name, parked)
        module.set_mode(module.base_layer.training)
        swap.parked = {}
    for name, record in reversed(merge.records.items()):  # positions are right in the reverse order of detaching
        recall_adapter(model, name, record)
    if merge.tied is not None:
        _set_tied(model, merge.tied)
    del model.lora_merged


def check_reversal(model: nn.Module, merge: MergeState) -> None:
    """Raise AdapterError unless `undo_merge` can restore the model."""
    if taken := [name for name in merge.names if name in adapter_configs(model)]:
        raise AdapterError(
            f"the model has a new adapter with the name of a merged one, '{taken[0]}'; remove it, and the merged one "
            "can come back"
        )
    present = set(model.modules())
    replaced = {swap.module for swap in merge.swaps}  # of modules around each other, the inner is the outer's base
    if gone := [swap.path for swap in merge.swaps if swap.new not in present | replaced]:
        raise AdapterError(f"{gone[0]} is no longer the layer that was merged, so the merge cannot be undone")
    around = {module.base_layer: (path, module) for path, module in adapter_modules(model).items()}
    for swap in merge.swaps:
        path, other = around.get(swap.new, ("", None))
        if other is not None and other is not swap.module and not _same_kind(other, swap.module):
            raise AdapterError(
                f"{path} is a {type(other).__name__} of adapter '{other.names()[0]}' now and was a "
                f"{type(swap.module).__name__} before the merge; remove that adapter first"
            )


def _current_module(model: nn.Module, swap: Swap) -> AdapterModule | None:
    """Return the module around a swap's new base layer, the old one or a later one of its kind; None if it is bare."""
    modules = (module for module in model.modules() if isinstance(module, AdapterModule))
    return next((one for one in modules if one.base_layer is swap.new and _same_kind(one, swap.module)), None)


def _same_kind(module: AdapterModule, other: AdapterModule) -> bool:
    return type(module) is type(other) and getattr(module, "parameter", None) == getattr(other, "parameter", None)


def _catch_up(swap: Swap) -> None:
    """Give the old objects the mode, device and dtype that the model has by now."""
    if swap.new is not swap.old:
        swap.old.train(swap.new.training).to(next(swap.new.parameters()).device)
    for exchange in swap.exchanges:
        _catch_up_with(exchange)


def _catch_up_with(exchange: Exchange) -> None:
    if exchange.before is not None:
        exchange.before.data = exchange.before.data.to(exchange.after.device, exchange.after.dtype)


def _set_tied(model: nn.Module, value: bool) -> bool | None:
    """Set `tie_word_embeddings` of a model's config; return its old value, None where there is no such setting."""
    config = getattr(model, "config", None)
    before: bool | None = getattr(config, "tie_word_embeddings", None)
    if isinstance(config, DecoderConfig):
        model.config = dataclasses.replace(config, tie_word_embeddings=value)  # type: ignore[assignment]
    elif before is not None:
        config.tie_word_embeddings = value  # type: ignore[union-attr]
    return before
