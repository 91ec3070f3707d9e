"""Adapters that wait in host memory: moved to their layers' device when they are used, and back when they are not.

A thousand adapters of one base then take the device's memory of those in use alone. The parameters stay the same
objects, and their dtype stays; on a CPU, where host and device are one, not even their memory moves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ...errors import AdapterError
from .state import checked_names, known_modules, state_of

_HOST = torch.device("cpu")


def offload_adapter(model: nn.Module, name: str | Sequence[str]) -> None:
    """Keep adapters in host memory; `set_adapter` and `use_rows` move them in while they use them.

    Raises:
        AdapterError: there is no adapter of that name, or it is trained: the optimizer's state is on the device.
    """
    names = checked_names(model, name)
    state = state_of(model)
    if trained := [one for one in names if one in state.trained]:
        raise AdapterError(f"adapter '{trained[0]}' is trained; freeze it with set_trained before it leaves the device")
    state.on_host.update(names)
    move_out(model)


def onload_adapter(model: nn.Module, name: str | Sequence[str]) -> None:
    """Bring adapters back to their layers' device, for good.

    Raises:
        AdapterError: there is no adapter of that name.
    """
    names = checked_names(model, name)
    move_in(model, names)
    state_of(model).on_host.difference_update(names)


def move_in(model: nn.Module, names: Sequence[str]) -> None:
    """Move those of the adapters that are kept in host memory to their layers' device."""
    for name in state_of(model).on_host.intersection(names):
        for part in known_modules(model, name):
            device = next(part.base_layer.parameters()).device
            for parameter in part.held_by(name):
                parameter.data = parameter.data.to(device, non_blocking=True)


def move_out(model: nn.Module) -> None:
    """Move adapters that are kept in host memory, and not in use, there."""
    state = state_of(model)
    for name in state.on_host:
        if not state.in_use(name):
            for part in known_modules(model, name):
                for parameter in part.held_by(name):
                    parameter.data = parameter.data.to(_HOST)
