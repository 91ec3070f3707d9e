"""The probes' figures for TensorBoard: minimum, median and maximum over all layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from ...errors import StorageError
from .log import LAYER_FIGURES


class TensorBoard:
    """Writes event files; after a resume, TensorBoard no longer shows the steps after the checkpoint.

    Args:
        folder: for the files.
        done: steps taken before a resume.

    Raises:
        StorageError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, done: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise StorageError("probes.tensorboard needs tensorboard: pip install 'lorakit[probes]'") from None
        self._writer: Any = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def write(self, row: Mapping[str, Any], log: Mapping[str, Any]) -> None:
        """Add one step: the probes' row and the row of train.jsonl."""
        for name in ("loss", "grad_norm", "lr"):
            self._writer.add_scalar(f"train/{name}", log[name], row["step"])
        if row.get("noise_scale") is not None:
            self._writer.add_scalar("probes/noise_scale", row["noise_scale"], row["step"])
        for name in LAYER_FIGURES:
            values = [value for value in row.get(name, ()) if math.isfinite(value)]
            for summary in (min, median, max) if values else ():
                self._writer.add_scalar(f"{name}/{summary.__name__}", summary(values), row["step"])

    def close(self) -> None:
        """Write what is left and close the file."""
        self._writer.close()
