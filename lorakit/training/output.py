"""The folder of a training run: who may write to it, which checkpoint the run goes on from, where its files go."""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import StorageError
from ..locks import claimed
from .checkpoints import newest_checkpoint, other_run

LOG, CHECKPOINTS = "train.jsonl", "checkpoints"
OF_A_RECIPE = ("recipe.yaml", "metrics.json")  # in the folder of a finished run of `lorakit train`


class OutputFolder:
    """Where a run writes train.jsonl and checkpoints/.

    Args:
        path: the folder, or None to write nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._earlier_log: Path | None = None

    @property
    def folders(self) -> Sequence[Path]:
        """The folders that may hold the run to resume, the likeliest first."""
        return [] if self.path is None else [self.path]

    def claimed(self) -> contextlib.AbstractContextManager[None]:
        """Keep other processes out; raises StorageError if one is there, or the folder cannot be made."""
        return contextlib.nullcontext() if self.path is None else claimed(self.path)

    def begin(self, checkpoint: Path | None) -> Path | None:
        """Get ready to write, now that everything is checked.

        Args:
            checkpoint: what the run goes on from, or None.

        Returns:
            The folder to write to.

        Raises:
            StorageError: the folder holds a finished run of `lorakit train`, and this is not its continuation.
        """
        if checkpoint is None and self.path and all((self.path / name).exists() for name in OF_A_RECIPE):
            raise StorageError(
                f"{self.path} holds a finished run of `lorakit train`, whose log this run would replace; name another "
                "output folder"
            )
        self.keep_earlier_log()
        return self.path

    def find_checkpoint(self, fingerprint: Mapping[str, Any]) -> Path | None:
        """Return the newest whole checkpoint of a run with this fingerprint; None, with a warning, if there is none.

        Raises:
            TrainingError: there are checkpoints of a run with other settings, data or base.
            CheckpointError: all checkpoints are broken.
        """
        found = [
            (path, state)
            for folder in self.folders
            for path, state in [newest_checkpoint(folder / CHECKPOINTS)]
            if path
        ]
        for path, state in found:
            if state["fingerprint"] == fingerprint:
                return path
        if found:
            raise other_run(found[0][0], found[0][1]["fingerprint"], fingerprint)
        self._earlier_log = next((folder / LOG for folder in self.folders if has_steps(folder)), None)
        self.begin_anew(self._earlier_log)
        return None

    def begin_anew(self, earlier_log: Path | None) -> None:
        """Say that there is nothing to resume.

        Args:
            earlier_log: the log of a run that took steps and left no checkpoint, or None.
        """
        warnings.warn(self.nothing_to_resume(earlier_log), stacklevel=5)

    def nothing_to_resume(self, earlier_log: Path | None) -> str:
        """Return what `begin_anew` says."""
        why = f"{self.path} has neither a checkpoint nor a step" if self.path else "no output folder is set"
        if earlier_log is not None:
            why = (
                f"{earlier_log} has steps, but there is no checkpoint beside it (checkpoint_every is not set, or the "
                f"run stopped before the first); that log is kept as {LOG}.1, or under the next free number"
            )
        return f"there is nothing to resume: {why}; training begins at step 1"

    def keep_earlier_log(self) -> None:
        """Give the log of a run that could not be resumed another name, "train.jsonl.1"."""
        if self._earlier_log is None:
            return
        numbers = itertools.count(1)
        kept = next(name for n in numbers if not (name := self._earlier_log.with_name(f"{LOG}.{n}")).exists())
        os.replace(self._earlier_log, kept)


def has_steps(folder: Path) -> bool:
    """Return whether a folder has the log of a run that took steps."""
    try:
        return (folder / LOG).stat().st_size > 0
    except OSError:
        return False
