"""Several adapters on one model: which are active, which are trained, which row of a batch uses which.

Active and trained are two states. `set_adapter` changes what the model computes and no parameter's requires_grad;
`set_trained` changes what learns and nothing that is computed. So an evaluation may switch to another adapter, or a
frozen one may be added beneath the one in training, and what is trained stays what was said.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn

from ...errors import AdapterError, did_you_mean
from ...layers import BASE, RowAdapters
from .host_memory import move_in, move_out
from .state import adapter_configs, apply_state, checked_names, known_modules, state_of


def set_adapter(model: nn.Module, name: str | Sequence[str]) -> None:
    """Make one adapter, the sum of several, or with [] none at all, active; what is trained stays as it is.

    Within `disable_adapters` or `use_rows` it takes effect when the context ends.

    Raises:
        AdapterError: there is no adapter of that name. Nothing is changed.
    """
    names = checked_names(model, name)
    state = state_of(model)
    move_in(model, names)
    state.active = names
    apply_state(model)
    move_out(model)


def set_trained(model: nn.Module, name: str | Sequence[str]) -> None:
    """Train one adapter, several, or with [] none; the others are frozen, what is active stays as it is.

    Only the parameters of adapters are touched: whatever else of the model was set to be trained, or not, stays so. An
    adapter gets gradients where it is also active, or the adapter of a row.

    Raises:
        AdapterError: there is no adapter of that name, or it is kept in host memory. Nothing is changed.
    """
    names = checked_names(model, name)
    state = state_of(model)
    if parked := [one for one in names if one in state.on_host]:
        raise AdapterError(
            f"adapter '{parked[0]}' is kept in host memory; bring it back with onload_adapter to train it"
        )
    state.trained = names
    for part in known_modules(model):
        for one in part.names():
            for parameter in part.parameters_of(one).values():
                parameter.requires_grad_(one in names)


def idle_adapters(model: nn.Module) -> list[str]:
    """Return the adapters that are to be trained but not active, nor any row's: no gradient reaches them."""
    state = state_of(model)
    return [name for name in state.trained if not state.in_use(name)]


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context the model computes as if no adapter were attached, whatever is switched meanwhile."""
    state = state_of(model)
    state.disabled += 1
    apply_state(model)
    try:
        yield model
    finally:
        state.disabled -= 1
        apply_state(model)


@contextlib.contextmanager
def use_rows(model: nn.Module, names: Sequence[str], lengths: Sequence[int] | None = None) -> Iterator[nn.Module]:
    """Within the context each row of a batch uses the adapter named for it, or with "__base__" none.

        with use_rows(model, ["french", "__base__", "french"]):
            logits = model(input_ids)                 # (3, seq)
            loss = summed_loss(model, *packed_batch)  # three sequences laid end to end
            answers = generate(model, tok, three_prompts)

    In training too: an adapter that is trained gets its gradient from its own rows. The backward pass of a transformers
    model with gradient checkpointing belongs inside the context; a `Decoder` remembers its rows.

    Args:
        names: one for each row. The adapters that `set_adapter` made active take no part.
        lengths: tokens of each row, for a model other than `Decoder` whose batch, (1, tokens), lays rows end to end.

    Raises:
        AdapterError: there is no adapter of that name, or one of them has a part that cannot differ from row to row.
        ShapeError: from the model, where a batch does not have that many rows.
    """
    if isinstance(names, str):
        raise AdapterError(f"use_rows takes a list with one name for each row, got the name '{names}'")
    known = [*adapter_configs(model), BASE]
    if unknown := [name for name in names if name not in known]:
        hint = did_you_mean(unknown[0], known)
        raise AdapterError(f"the model has no adapter '{unknown[0]}'{hint} (for a row: {', '.join(known)})")
    rows = RowAdapters(names, lengths)
    for part in known_modules(model):
        carried = (name for name in rows.adapters if name in part.names())
        if whole := [name for name in carried if not part.supports_rows(name)]:
            kind = type(part).__name__
            raise AdapterError(f"adapter '{whole[0]}' changes a {kind}, which cannot differ from row to row")
    state = state_of(model)
    move_in(model, rows.adapters)
    state.rows.append(rows)
    apply_state(model)
    try:
        yield model
    finally:
        state.rows = [other for other in state.rows if other is not rows]
        apply_state(model)
        move_out(model)
