"""`merge_adapter` and `unmerge_adapter`: an adapter becomes part of the weights, and the weights come back to the bit.

A merge never writes to a weight. It computes all new weights first, then puts them in place of the old ones, and keeps
the old ones with the adapter's own matrices. So a failed merge changes nothing, a weight that is shared with another
module (a tied embedding) keeps its values there, and unmerging puts the old objects back.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from ...errors import AdapterError
from ..attach.host_memory import move_in, move_out
from ..attach.state import adapter_configs, check_adapter, check_not_in_a_row, home_of, homes
from ..attach.wrappers import check_not_divided
from .base import Base, WrongBase
from .plan import plan_merge
from .report import LEAST_SHARE, MergeReport
from .swaps import apply_merge, check_reversal, merged_state, undo_merge


def merge_adapter(
    model: nn.Module,
    name: str | Sequence[str] = "default",
    base: Base = None,
    quantize: bool = False,
    residual_rank: int | None = None,
    reversible: bool = True,
) -> MergeReport:
    """Add an adapter's update, or the sum of several, to the weights of its layers, whether it is active or not.

    The adapter is then no longer attached; a layer without another adapter becomes a plain one. A layer in 16 or 32
    bits keeps its dtype. A 4-bit layer becomes dense, unless `quantize` asks for 4 bits:

    =========  =================================  ==========================================================
    quantize   with a 16-bit base                 without
    =========  =================================  ==========================================================
    False      base + update                      dequantize(W) + update
    True       quantize(base + update)            4 bits, and the update as a low-rank part beside them
    =========  =================================  ==========================================================

    If other adapters are merged already, all of them are merged again from the original weights, so the order makes no
    difference.

    Args:
        base: folder or known name of the 16-bit checkpoint from which a 4-bit model was quantized. None uses the folder
            that the model was loaded from, if it still has the weights; False uses none.
        quantize: leave 4-bit layers in 4 bits, each in its own format.
        residual_rank: most columns of the low-rank part beside 4 bits; None takes as many as the update has, which
            keeps all of it.
        reversible: keep the original weights for `unmerge_adapter`.

    Returns:
        A report of how much of the update survived in each layer. Below 0.95 there is a warning too.

    Raises:
        AdapterError: there is no such adapter, or it is merged already; a merged weight would hold inf or nan; less
            than 0.95 of an update would survive beside 4 bits at the given residual_rank; or merging would change the
            update of another adapter. The model is unchanged.
        CheckpointError: the named base is missing or malformed, or the model was not made from it.
    """
    names = (name,) if isinstance(name, str) else tuple(dict.fromkeys(name))
    _check_names(model, names)
    check_not_divided(model, "save the adapter, and merge it into the model before it is divided")
    model = home_of(model, names)
    earlier = merged_state(model)
    if earlier is not None:
        check_reversal(model, earlier)
        undo_merge(model, earlier)
    try:
        all_names = (*(earlier.names if earlier else ()), *names)
        move_in(model, all_names)
        plan = plan_merge(model, all_names, base, quantize, residual_rank)
        try:
            layers = [plan.merge_layer(path) for path in plan.modules]
        except WrongBase as error:
            plan = plan.onto_own_weights(error)
            layers = [plan.merge_layer(path) for path in plan.modules]
        merge, report = plan.completed(model, layers)
    except BaseException:
        if earlier is not None:
            apply_merge(model, earlier)
        raise
    finally:
        move_out(model)
    apply_merge(model, merge)
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
    """Undo all merges: the original weight tensors come back, and the adapters are attached again as before.

    Raises:
        AdapterError: nothing is merged, or it was merged with reversible=False; a merged layer is no longer in the
            model; or a new adapter has the name of a merged one. The model is unchanged.
    """
    merged = [(home, state) for home in homes(model) if (state := merged_state(home)) is not None]
    if not merged:
        raise AdapterError("nothing is merged into this model that could be undone")
    for home, state in merged:
        check_reversal(home, state)
    for home, state in merged:
        undo_merge(home, state)
        move_out(home)


def _check_names(model: nn.Module, names: Sequence[str]) -> None:
    if not names:
        raise AdapterError("no adapter is named; nothing to merge")
    merged = [name for home in homes(model) if (state := merged_state(home)) for name in state.names]
    for name in names:
        if name in merged and name not in adapter_configs(model):
            raise AdapterError(f"the adapter '{name}' is merged already; unmerge_adapter(model) takes it out again")
        check_adapter(model, name)
        check_not_in_a_row(home_of(model, name), name)
