"""Training: the loop, its settings, schedule, checkpoints and log."""

from .config import TrainConfig
from .probe import TrainingProbe
from .trainer import TrainResult, mean_loss, train

__all__ = ["TrainConfig", "TrainResult", "TrainingProbe", "mean_loss", "train"]
