"""Training: the loop, its settings, schedule, checkpoints and log."""

from .config import TrainConfig
from .trainer import TrainResult, mean_loss, train

__all__ = ["TrainConfig", "TrainResult", "mean_loss", "train"]
