"""The optimizers that a run can choose, one file each, and how a run's settings build one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import TrainingError
from ..config import TrainConfig
from .adamw import AdamW
from .adamw_8bit import SMALLEST_8BIT, AdamW8bit
from .lion import Lion
from .offload import states_to_host, step_from_host

__all__ = [
    "OPTIMIZERS",
    "SMALLEST_8BIT",
    "AdamW",
    "AdamW8bit",
    "Lion",
    "build_optimizer",
    "set_learning_rate",
    "state_keys",
    "states_to_host",
    "step_from_host",
]

_ADAMW_SETTINGS = ("betas", "eps", "weight_decay")
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], tuple[str, ...]]] = {  # and the settings that each takes
    "adamw": (AdamW, _ADAMW_SETTINGS),
    "adamw_8bit": (AdamW8bit, _ADAMW_SETTINGS),
    "lion": (Lion, ("betas", "weight_decay")),
}


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer that a run's settings name, for parameters by their names in the model.

    With `loraplus_lr_ratio` there are two groups (LoRA+, Hayou et al. 2024, arXiv:2402.12354, section 4): the B of
    linear layers, whose "lr_factor" is the ratio, and everything else, A and the rest, whose factor is 1.

    Raises:
        TrainingError: there is a ratio, but no B of a linear layer to train.
    """
    kind, settings = OPTIMIZERS[config.optimizer]
    ratio = config.loraplus_lr_ratio
    faster = {name: p for name, p in parameters.items() if ratio is not None and "lora_B" in name.split(".")}
    if ratio is not None and not faster:
        raise TrainingError("loraplus_lr_ratio sets the learning rate of lora_B, but no lora_B is trained")
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in parameters.items() if name not in faster], "lr_factor": 1.0}
    ]
    if ratio is not None:
        groups.append({"params": list(faster.values()), "lr_factor": ratio})
    optimizer = kind([group for group in groups if group["params"]], **config.model_dump(include=set(settings)))
    set_learning_rate(optimizer, config.lr)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step, each group's times its "lr_factor"."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def state_keys(optimizer: torch.optim.Optimizer, parameter: Tensor) -> tuple[str, ...]:
    """Return the names of the tensors that the optimizer keeps for a parameter of any shape, stepped or not."""
    if isinstance(optimizer, AdamW8bit | Lion):
        return optimizer.state_keys(parameter)
    return ("exp_avg", "exp_avg_sq", "step")
