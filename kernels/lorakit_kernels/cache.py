"""The cache folder and the file lock that both the kernels and the library above use."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


def cache_folder() -> Path:
    """Return lorakit's cache folder: $LORAKIT_CACHE, or the platform's convention (XDG, macOS, Windows).

    Raises:
        RuntimeError: the user has no home folder, as in some containers.
    """
    if override := os.environ.get("LORAKIT_CACHE"):
        return Path(override).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "lorakit" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lorakit"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakit"


@contextlib.contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold a lock that other processes wait for. The system releases it even when the holder is killed.

    Creates the file and its folder if they are missing. An existing file is neither truncated nor written to. A
    symbolic link is refused, since a link planted in a shared folder could point at anything.

    Raises:
        OSError: the file cannot be opened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        if sys.platform == "win32":
            import msvcrt

            while True:
                with contextlib.suppress(OSError):  # LK_LOCK gives up after ten seconds
                    msvcrt.locking(handle, msvcrt.LK_LOCK, 1)
                    break
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
