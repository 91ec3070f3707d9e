"""What a merge exchanges in a model, and how it is put back: pointers, never numbers.

The adapted layers, the weights they had and the adapters' own matrices are kept as they are. Undoing a merge is putting
the same objects in their places again, so every byte is what it was.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

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
    """One parameter in the place of another: `module.name` was `before` and becomes `after`."""

    module: nn.Module
    name: str
    before: nn.Parameter | None
    after: nn.Parameter


@dataclass
class Swap:
    """What happens to one part of an adapter.

    Attributes:
        path: of the part.
        part: what stands in the place of the frozen module.
        old, new: its base layer before and after; the same module unless it was in 4 bits.
        exchanges: the parameters that change.
        parked: adapter name -> the record of it that the part had, while the merge lasts.
    """

    path: str
    part: AdapterModule
    old: nn.Module
    new: nn.Module
    exchanges: list[Exchange] = field(default_factory=list)
    parked: dict[str, Any] = field(default_factory=dict)


@dataclass
class MergeState:
    """What a model remembers of its merges, as `model.lora_merged`.

    Attributes:
        names: of the merged adapters.
        swaps: what was exchanged, in model order.
        unties: whether an output head was parted from the embedding that it was tied to.
        records: adapter name -> what the model knew of it.
        tied: what its config said of tied embeddings before, if that was changed.
    """

    names: tuple[str, ...]
    swaps: list[Swap]
    unties: bool
    records: dict[str, AdapterRecord] = field(default_factory=dict)
    tied: bool | None = None


def merged_state(model: nn.Module) -> MergeState | None:
    """Return what is merged into a model, or None."""
    return cast("MergeState | None", getattr(model, "lora_merged", None))


def apply_merge(model: nn.Module, merge: MergeState) -> None:
    """Put the merged weights in their places and take the adapters off; nothing here can fail."""
    for swap in merge.swaps:
        swap.part.forget_base()
        swap.parked = {name: swap.part.detach(name) for name in merge.names if name in swap.part.names()}
        swap.part.base_layer = swap.new
        for exchange in swap.exchanges:
            setattr(exchange.module, exchange.name, exchange.after)
        if not swap.part.names():
            replace_module(model, swap.part, swap.new)
    merge.records = {name: forget_adapter(model, name) for name in merge.names}
    merge.tied = _set_tied(model, False) if merge.unties else None
    model.lora_merged = merge  # type: ignore[assignment]


def undo_merge(model: nn.Module, merge: MergeState) -> None:
    """Reverse `apply_merge`, even if adapters were attached to the merged layers since; call `check_reversal` first."""
    for swap in reversed(merge.swaps):  # of parts around each other, the inner one first
        part = _host(model, swap)
        if part is None:
            part = swap.part.train(swap.new.training)
            replace_module(model, swap.new, part)
        swap.part = part
        _follow(swap)
        part.base_layer = swap.old
        for exchange in swap.exchanges:
            setattr(exchange.module, exchange.name, exchange.before)
        part.forget_base()
        for name, parked in swap.parked.items():
            part.attach(name, parked)
        swap.parked = {}
    for name, record in reversed(merge.records.items()):  # the last one taken off was the first to find its place
        recall_adapter(model, name, record)
    if merge.tied is not None:
        _set_tied(model, merge.tied)
    del model.lora_merged


def check_reversal(model: nn.Module, merge: MergeState) -> None:
    """Raise AdapterError unless `undo_merge` can do what it should."""
    if taken := [name for name in merge.names if name in adapter_configs(model)]:
        raise AdapterError(
            f"the model has a new adapter of the name of a merged one, '{taken[0]}'; remove it, and the merged one can "
            "come back"
        )
    present = set(model.modules())
    taken_off = {swap.part for swap in merge.swaps}  # of parts around each other the outer one's base is the inner one
    if gone := [swap.path for swap in merge.swaps if swap.new not in present | taken_off]:
        raise AdapterError(f"{gone[0]} is no longer the layer that was merged, so the merge cannot be undone")
    around = {part.base_layer: (path, part) for path, part in adapter_modules(model).items()}
    for swap in merge.swaps:
        path, other = around.get(swap.new, ("", None))
        if other is not None and other is not swap.part and not _alike(other, swap.part):
            raise AdapterError(
                f"{path} is a {type(other).__name__} of adapter '{other.names()[0]}' now, and was a "
                f"{type(swap.part).__name__} before the merge; remove that adapter first"
            )


def _host(model: nn.Module, swap: Swap) -> AdapterModule | None:
    """Return the part that holds a swap's new base layer now: the one that did before, or a later one like it."""
    parts = (module for module in model.modules() if isinstance(module, AdapterModule))
    return next((part for part in parts if part.base_layer is swap.new and _alike(part, swap.part)), None)


def _alike(part: AdapterModule, other: AdapterModule) -> bool:
    return type(part) is type(other) and getattr(part, "parameter", None) == getattr(other, "parameter", None)


def _follow(swap: Swap) -> None:
    """Give what comes back the mode, device and dtype that the model has by now."""
    if swap.new is not swap.old:
        swap.old.train(swap.new.training).to(next(swap.new.parameters()).device)
    for exchange in swap.exchanges:
        if exchange.before is not None:
            exchange.before.data = exchange.before.data.to(exchange.after.device, exchange.after.dtype)


def _set_tied(model: nn.Module, value: bool) -> bool | None:
    """Set what the model's config says of a tied output head; return what it said, None where it says nothing."""
    config = getattr(model, "config", None)
    before: bool | None = getattr(config, "tie_word_embeddings", None)
    if isinstance(config, DecoderConfig):
        model.config = dataclasses.replace(config, tie_word_embeddings=value)  # type: ignore[assignment]
    elif before is not None:
        config.tie_word_embeddings = value  # type: ignore[union-attr]
    return before
