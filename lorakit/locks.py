"""Locks on files and folders, held by an open handle: they end with their process, however it ends.

A lock is the system's (flock), so it leaves no file behind, and what a killed process held is free. Windows and some
network file systems have none; there everything works as if nobody else were there.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from .errors import StorageError


def try_lock(handle: int) -> bool | None:
    """Lock what a handle has open; return False if another handle has the lock, None if the system has no locks."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_at(handle: int, path: Path) -> bool:
    """Return whether `path` is still what a handle has open: it was neither removed nor replaced."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, if the system can.

    Raises:
        StorageError: another process has it.
        OSError: the folder cannot be opened.
    """
    if sys.platform == "win32":  # which cannot open a folder
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        if try_lock(handle) is False or not is_at(handle, folder):
            raise StorageError(f"{folder} is being written by another process; wait for it, or name another folder")
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make a folder, keep other processes out of it, and remove it again at the end if nothing was written to it.

    Raises:
        StorageError: another process has it, or it cannot be made.
    """
    made: list[Path] = []
    try:
        made = [one for one in (folder, *folder.parents) if not one.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock = contextlib.ExitStack()
        lock.enter_context(locked(folder))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}") from error
    with lock:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # not empty
                for one in made:
                    one.rmdir()
