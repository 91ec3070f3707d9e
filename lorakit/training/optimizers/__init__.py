"""The optimizers of a training run, each with one file and one line in a table."""

from __future__ import annotations

from .adamw import AdamW
from .adamw_8bit import SMALLEST_8BIT, AdamW8bit
from .base import Optimizer
from .lion import Lion
from .offload import states_to_host, step_from_host

__all__ = [
    "OPTIMIZERS",
    "SMALLEST_8BIT",
    "AdamW",
    "AdamW8bit",
    "Lion",
    "Optimizer",
    "states_to_host",
    "step_from_host",
]

OPTIMIZERS: dict[str, type[Optimizer]] = {  # the names that `TrainConfig.optimizer` takes
    "adamw": AdamW,
    "adamw_8bit": AdamW8bit,
    "lion": Lion,
}
