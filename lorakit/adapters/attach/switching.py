"""Several adapters on one model: which are active, which are trained, which row of a batch uses which.

An adapter can be active, trained, both or neither. `set_adapter` changes the model's output and no parameter's
requires_grad; `set_trained` changes what learns and leaves the output alone. So an evaluation can switch to another
adapter, and a frozen adapter can be active under the one in training, without changing what is trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn

from ...errors import AdapterError, did_you_mean
from ...layers import BASE, RowAdapters
from .host_memory import move_in, move_out
from .state import adapter_configs, apply_state, checked_names, homes, known_modules, state_of
from .wrappers import inner_module


def set_adapter(model: nn.Module, name: str | Sequence[str]) -> None:
    """Activate one adapter, the sum of several, or none ([]); the choice of trained adapters stays as it is.

    Within `disable_adapters` or `use_rows` it takes effect when the context ends.

    Raises:
        AdapterError: there is no adapter of that name. Nothing is changed.
    """
    names = checked_names(model, name)
    for home in homes(model):
        state = state_of(home)
        move_in(home, names)
        state.active = tuple(one for one in names if one in state.configs)
        apply_state(home)
        move_out(home)


def set_trained(model: nn.Module, name: str | Sequence[str]) -> None:
    """Train one adapter, several, or none ([]); the others are frozen, and active adapters stay active.

    Only the parameters of adapters change: requires_grad of all others stays as you set it. A trained adapter gets
    gradients only while it is active or used by a row.

    Raises:
        AdapterError: there is no adapter of that name, or it is kept in host memory. Nothing is changed.
    """
    names = checked_names(model, name)
    found = homes(model)
    if on_host := [adapter for adapter in names for home in found if adapter in state_of(home).on_host]:
        raise AdapterError(
            f"adapter '{on_host[0]}' is kept in host memory; bring it back with onload_adapter to train it"
        )
    for home in found:
        state_of(home).trained = tuple(one for one in names if one in state_of(home).configs)
        for module in known_modules(home):
            for adapter in module.names():
                for parameter in module.parameters_of(adapter).values():
                    parameter.requires_grad_(adapter in names)


def idle_adapters(model: nn.Module) -> list[str]:
    """Return the trained adapters that no gradient reaches: they are neither active nor used by a row."""
    states = [state_of(home) for home in homes(model)]
    return [name for state in states for name in state.trained if not state.in_use(name)]


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context the model computes as if it had no adapter, whatever you switch meanwhile."""
    found = homes(model)
    for home in found:
        state_of(home).disabled += 1
        apply_state(home)
    try:
        yield model
    finally:
        for home in found:
            state_of(home).disabled -= 1
            apply_state(home)


@contextlib.contextmanager
def use_rows(model: nn.Module, names: Sequence[str], lengths: Sequence[int] | None = None) -> Iterator[nn.Module]:
    """Within the context each row of a batch uses the adapter named for it; "__base__" stands for no adapter.

        with use_rows(model, ["french", "__base__", "french"]):
            logits = model(input_ids)                 # (3, seq)
            loss = summed_loss(model, *packed_batch)  # three sequences laid end to end
            answers = generate(model, tok, three_prompts)

    It works in training too: a trained adapter gets its gradient from its own rows. Run the backward pass of a
    transformers model with gradient checkpointing inside the context; a `Decoder` remembers its rows.

    Args:
        names: one for each row. The adapters that `set_adapter` made active take no part.
        lengths: tokens of each row, for a model other than `Decoder` whose batch, (1, tokens), lays rows end to end.

    Raises:
        AdapterError: there is no adapter of that name, or it changes a module that cannot differ from row to row.
        ShapeError: from the model, if a batch has another number of rows.
    """
    if isinstance(names, str):
        raise AdapterError(f"use_rows takes a list with one name for each row, got the name '{names}'")
    known = [*adapter_configs(model), BASE]
    if unknown := [name for name in names if name not in known]:
        hint = did_you_mean(unknown[0], known)
        raise AdapterError(f"the model has no adapter '{unknown[0]}'{hint} (for a row: {', '.join(known)})")
    rows = RowAdapters(names, lengths)
    found = homes(model)
    if (inner := inner_module(model)) not in found:
        found = [*found, inner]  # the model too is told of its rows when only parts of it have adapters
    for module in [module for home in found for module in known_modules(home)]:
        carried = (name for name in rows.adapters if name in module.names())
        if unsupported := [name for name in carried if not module.supports_rows(name)]:
            kind = type(module).__name__
            raise AdapterError(f"adapter '{unsupported[0]}' changes a {kind}, which cannot differ from row to row")
    for home in found:
        move_in(home, rows.adapters)
        state_of(home).rows.append(rows)
        apply_state(home)
    try:
        yield model
    finally:
        for home in found:
            state = state_of(home)
            state.rows = [other for other in state.rows if other is not rows]
            apply_state(home)
            move_out(home)
