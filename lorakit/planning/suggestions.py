"""Which settings to change so that a plan fits: every combination is planned, which takes milliseconds each."""

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

_CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "mlp", 4, 3, 2, "layer")  # each computes more than the one before
_SHOWN = 5


def suggestions(setting: Setting, plan: Plan, limit: int) -> tuple[Suggestion, ...]:
    """Return changes under which a plan fits, the fewest FLOPs first; nothing where it fits as it is.

    Of changes with equal FLOPs those come first that leave every result as it was (a smaller micro-batch), then an
    optimizer in 8 bits, then 4-bit weights. A change that does more than a cheaper one is left out.

    Raises:
        ConfigError: nothing fits; it names the least that can be reached, and how.
    """
    if plan.peak_bytes <= limit:
        return ()
    found = [_suggestion(setting, other, plan) for other in _smaller_settings(setting)]
    fitting = [suggestion for suggestion in found if suggestion.peak_bytes <= limit]
    if not fitting:
        least = min(found, key=lambda suggestion: (suggestion.peak_bytes, suggestion.flops.total), default=None)
        reached = f"the least is {format_size(plan.peak_bytes)}, as it is"
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
    """Yield every setting that takes less memory at one end, this one left out."""
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
        # Made anew for other weights alone: the shapes of all layers are what takes time.
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
