"""The log of a training run: train.jsonl, one line a step, and a progress bar."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import StorageError
from ..files import finite, write_text


class RunLog:
    """Collects one row a step, appends it to train.jsonl, and shows it.

    A terminal shows a progress bar. Other outputs (a file, CI) get about ten lines over the run.

    Args:
        path: the path of train.jsonl, or None to write nothing.
        steps: steps of the whole run.
        rows: rows of the steps before a resume.
        show: whether to print at all.
    """

    def __init__(self, path: Path | None, steps: int, rows: list[dict[str, Any]], show: bool) -> None:
        self.rows, self.steps, self.show = rows, steps, show
        self.console = Console()
        self._file = None
        if path is not None:
            write_text(path, "".join(_line(row) for row in rows))  # drops steps after the checkpoint
            self._file = path.open("a", encoding="utf-8")
        self._bar = Progress(
            TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"),
            TextColumn("ETA"), TimeRemainingColumn(), console=self.console, disable=not self._is_live(),
        )  # fmt: skip
        self._task = self._bar.add_task("train", total=steps, completed=len(rows), status="")

    def _is_live(self) -> bool:
        return self.show and self.console.is_terminal

    def __enter__(self) -> RunLog:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._file is not None:
            with contextlib.suppress(OSError):  # every line was flushed, or its error reported
                self._file.close()

    def step(self, row: Mapping[str, Any]) -> None:
        """Record one step.

        Raises:
            StorageError: the disk is full, or the folder is gone.
        """
        self.rows.append(dict(row))
        if self._file is not None:
            try:
                self._file.write(_line(row))
                self._file.flush()
            except OSError as error:
                raise StorageError(f"cannot write {self._file.name}: {error.strerror or error}") from error
        done = row["step"]
        speed = row["tokens"] / max(row["step_seconds"], 1e-9)
        status = f"loss {row['loss']:.3f}  {speed:,.0f} tok/s  {row['peak_rss_mb']:,.0f} MiB peak"
        if "eval_loss" in row:
            status += f"  held-out loss {row['eval_loss']:.3f}"
        self._bar.update(self._task, completed=done, status=status)
        every = max(1, self.steps // 10)
        if self.show and not self._is_live() and (done % every == 0 or done == self.steps):
            remaining = row["seconds"] / done * (self.steps - done)
            print(f"train {done}/{self.steps}  {status}  {remaining:.0f} s left", flush=True)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(finite(row), allow_nan=False) + "\n"
