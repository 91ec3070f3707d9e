"""Building a run's optimizer from its settings, and LoRA+: a separate learning rate for B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...errors import TrainingError
from ..config import TrainConfig
from . import OPTIMIZERS
from .base import Optimizer


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> Optimizer:
    """Return the optimizer that a run's settings name.

    With `loraplus_lr_ratio` there are two groups (LoRA+, Hayou et al. 2024, arXiv:2402.12354, section 4): the B of
    linear layers with the ratio as "lr_factor", and all other parameters with 1.

    Args:
        parameters: name in the model -> parameter, of any shape, in fp32, bf16 or fp16.

    Raises:
        TrainingError: there is a ratio, but no B of a linear layer to train.
    """
    kind = OPTIMIZERS[config.optimizer]
    ratio = config.loraplus_lr_ratio
    faster = {name: p for name, p in parameters.items() if ratio is not None and "lora_B" in name.split(".")}
    if ratio is not None and not faster:
        raise TrainingError("loraplus_lr_ratio sets the learning rate of lora_B, but no lora_B is trained")
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in parameters.items() if name not in faster], "lr_factor": 1.0}
    ]
    if ratio is not None:
        groups.append({"params": list(faster.values()), "lr_factor": ratio})
    values = {name: getattr(config, name) for name in kind.settings}
    settings: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    optimizer = kind([group for group in groups if group["params"]], **settings)
    set_learning_rate(optimizer, config.lr)
    return optimizer


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of the next step; each group gets `lr` times its "lr_factor"."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
