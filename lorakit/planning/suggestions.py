"""Suggestions of settings under which a plan fits: every combination is planned, in milliseconds each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from types import MappingProxyType

from ..errors import ConfigError
from ..sizes import format_size
from ..training.optimizers import OPTIMIZERS
from .activations import Checkpointing
from .result import Plan, Suggestion
from .setting import Setting

_CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "mlp", 4, 3, 2, "layer")  # each recomputes more than the last
_SHOWN = 5


def suggestions(setting: Setting, plan: Plan, limit: int) -> tuple[Suggestion, ...]:
    """Return changes under which a plan fits, the fewest FLOPs first; nothing if the plan already fits.

    Among changes with equal FLOPs, a smaller micro-batch comes first, because it leaves every result unchanged. Then
    come an 8-bit optimizer and 4-bit weights. A change that contains all changes of a cheaper one is left out.

    Raises:
        ConfigError: nothing fits; the message names the lowest peak that can be reached, and its settings.
    """
    if plan.peak_bytes <= limit:
        return ()
    candidates = [_suggestion(setting, other, plan) for other in _smaller_settings(setting)]
    fitting = [suggestion for suggestion in candidates if suggestion.peak_bytes <= limit]
    if not fitting:
        least = min(candidates, key=lambda suggestion: (suggestion.peak_bytes, suggestion.flops.total), default=None)
        reached = f"the least is {format_size(plan.peak_bytes)}, without a change"
        if least is not None and least.peak_bytes < plan.peak_bytes:
            reached = f"the least is {format_size(least.peak_bytes)}, with {least}"
        raise ConfigError(
            f"nothing fits {format_size(limit)} at {setting.length} tokens a sequence: {reached}; "
            "take shorter sequences, a lower rank or a smaller model"
        )
    fitting.sort(key=_rank)
    kept: list[Suggestion] = []
    for suggestion in fitting:
        if not any(other.changes.keys() <= suggestion.changes.keys() for other in kept):
            kept.append(suggestion)
    return tuple(kept[:_SHOWN])


def _rank(suggestion: Suggestion) -> tuple[int, int, int, int]:
    changes = suggestion.changes
    lossy = 2 * ("quant_type" in changes) + ("optimizer" in changes)
    return suggestion.flops.total, lossy, len(changes), -int(changes.get("micro_batch_tokens", 0))


def _smaller_settings(setting: Setting) -> Iterator[Setting]:
    """Yield every combination of memory-saving changes, without the setting itself."""
    train, quant = setting.train, setting.quant
    kinds = [train.checkpointing, *_more(train.checkpointing)]
    sizes = [train.micro_batch_tokens]
    while sizes[-1] > setting.length:
        sizes.append(max(setting.length, sizes[-1] // 2))
    optimizers = [train.optimizer, *filter(None, [OPTIMIZERS[train.optimizer].frugal])]
    quants = [quant]
    if not (quant.quant_type or any(linear.trains_weight for linear in setting.shape.linears)):
        quants.append(quant.model_copy(update={"quant_type": "nf4"}))
    for chosen in quants:
        # Other weights need new shapes, which take most of the time; training settings share them.
        base = setting if chosen is quant else replace(setting, quant=chosen)
        for kind, size, optimizer in itertools.product(kinds, sizes, optimizers):
            changes = {"checkpointing": kind, "micro_batch_tokens": size, "optimizer": optimizer}
            other = base.with_train(train.model_copy(update=changes))
            if other != setting:
                yield other


def _more(kind: Checkpointing) -> list[Checkpointing]:
    """Return the kinds that keep less than `kind`."""
    if isinstance(kind, int):
        return [other for other in _CHECKPOINTING if other == "layer" or (isinstance(other, int) and other < kind)]
    return list(_CHECKPOINTING[_CHECKPOINTING.index(kind) + 1 :])


def _suggestion(setting: Setting, other: Setting, plan: Plan) -> Suggestion:
    before = {**setting.train.model_dump(), "quant_type": setting.quant.quant_type}
    after = {**other.train.model_dump(), "quant_type": other.quant.quant_type}
    changes = {name: value for name, value in after.items() if value != before[name]}
    result = other.plan()
    more = result.flops.total / plan.flops.total - 1
    return Suggestion(MappingProxyType(changes), result.peak_bytes, result.flops, more)
