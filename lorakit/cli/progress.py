"""A progress bar over bytes, and sizes as people write them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from ..errors import ConfigError

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{end}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for end, base in (("B", 1000), ("IB", 1024))
}


@contextlib.contextmanager
def byte_progress(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Show a bar with bytes, bytes a second and the time left; yields what is called with (done, total)."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("")

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield show


def parse_size(text: str) -> int:
    """Return the bytes of "5GB" (10^9 each), "512MiB" (2^20 each), "1000000".

    Raises:
        ConfigError: it is not a size, or not a positive one.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    size = 0
    if match and match[2].upper() in _UNITS:
        size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size < 1:
        raise ConfigError(f"'{text}' is not a size; write it like 5GB, 500MB or 512MiB")
    return size
