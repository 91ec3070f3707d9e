"""Adapters that wait in host memory: they move to their layers' device for use, and back afterwards.

A thousand adapters of one base then take only the device memory of those in use. The parameters stay the same objects
and keep their dtype. On a CPU, where host and device are one, their memory does not move either.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ...errors import AdapterError
from .state import checked_names, home_of, known_modules, state_of

_HOST = torch.device("cpu")


def offload_adapter(model: nn.Module, name: str | Sequence[str]) -> None:
    """Keep adapters in host memory; `set_adapter` and `use_rows` move them to the device while they use them.

    Raises:
        AdapterError: there is no adapter of that name, or it is trained: the optimizer's state is on the device.
    """
    names = checked_names(model, name)
    home = home_of(model, names)
    state = state_of(home)
    if trained := [adapter for adapter in names if adapter in state.trained]:
        raise AdapterError(f"adapter '{trained[0]}' is trained; freeze it with set_trained before it leaves the device")
    state.on_host.update(names)
    move_out(home)


def onload_adapter(model: nn.Module, name: str | Sequence[str]) -> None:
    """Bring adapters back to their layers' device for good.

    Raises:
        AdapterError: there is no adapter of that name.
    """
    names = checked_names(model, name)
    home = home_of(model, names)
    move_in(home, names)
    state_of(home).on_host.difference_update(names)


def move_in(home: nn.Module, names: Sequence[str]) -> None:
    """Move the adapters among `names` that are kept in host memory to their layers' device."""
    for name in state_of(home).on_host.intersection(names):
        for module in known_modules(home, name):
            device = module.device
            for parameter in module.held_by(name):
                parameter.data = parameter.data.to(device, non_blocking=True)


def move_out(home: nn.Module) -> None:
    """Move the adapters that are kept in host memory back there, except those in use."""
    state = state_of(home)
    for name in state.on_host:
        if not state.in_use(name):
            for module in known_modules(home, name):
                for parameter in module.held_by(name):
                    parameter.data = parameter.data.to(_HOST)
