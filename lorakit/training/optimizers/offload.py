"""Optimizer states in host memory that visit the GPU one parameter at a time.

AdamW keeps 8 bytes a trained parameter, which are needed only briefly, once a step. QLoRA's paged optimizers (Dettmers
et al. 2023, arXiv:2305.14314, section 3) let the driver choose which of them are on the GPU. Here each parameter's
states are copied there for its own update and back, so the GPU never holds more than one parameter's.
"""

from __future__ import annotations

import torch
from torch import Tensor


def step_from_host(optimizer: torch.optim.Optimizer) -> None:
    """Take the optimizer's step, one parameter after the other, with all states in host memory before and after.

    The optimizer must update a parameter from that parameter's gradient and state alone. The result is that of
    optimizer.step(). For parameters on a GPU the host memory is pinned, and the copies wait in the queue of the GPU's
    own work. On the CPU they are plain copies.
    """
    groups = optimizer.param_groups
    try:
        for group in groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                host = optimizer.state.get(parameter, {})
                optimizer.state[parameter] = {key: _visiting(key, host[key], parameter) for key in host}
                optimizer.param_groups = [{**group, "params": [parameter]}]
                optimizer.step()
                _return_state(optimizer, parameter, host)
    finally:
        optimizer.param_groups = groups
    _wait_for_copies(optimizer)


def states_to_host(optimizer: torch.optim.Optimizer) -> None:
    """Move all states that are on a GPU to host memory, as after loading a checkpoint."""
    for parameter, state in optimizer.state.items():
        if any(value.device.type != "cpu" for value in state.values()):
            _return_state(optimizer, parameter, {})
    _wait_for_copies(optimizer)


def _visiting(key: str, value: Tensor, parameter: Tensor) -> Tensor:
    """Return a copy of a state on the parameter's device; torch's optimizers need the step count on the host."""
    return value if key == "step" else value.to(parameter.device, non_blocking=True, copy=True)


def _return_state(optimizer: torch.optim.Optimizer, parameter: Tensor, host: dict[str, Tensor]) -> None:
    """Copy a parameter's state into its host tensors, which the first call allocates."""
    state = optimizer.state[parameter]
    for key, value in state.items():
        if key not in host:
            pinned = parameter.device.type != "cpu" and value.device.type != "cpu"
            host[key] = torch.empty_like(value, device="cpu", pin_memory=pinned)
        host[key].copy_(value, non_blocking=True)
    optimizer.state[parameter] = host


def _wait_for_copies(optimizer: torch.optim.Optimizer) -> None:
    for device in {parameter.device for parameter in optimizer.state}:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
