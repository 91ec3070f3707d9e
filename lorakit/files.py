"""Files that are whole or absent: atomic writes, strict JSON reading and hashes.

Everything lorakit writes goes through `atomic_write` or `atomic_folder`. They write beside the target, flush to disk,
then rename. A crash, a kill or a full disk leaves the old content or nothing, never half of the new. What a killed
process had begun to write stays beside the target until the next write there, which removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import CheckpointError, StorageError
from .locks import is_at, try_lock

_WRITE_ERRORS = (OSError, SafetensorError)  # safetensors does not raise OSError when the disk is full


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it over `path`.

    Raises:
        StorageError: the target's folder cannot be written or the disk is full; `path` is as it was.
    """
    target = Path(path)
    with _part_of(target, is_folder=False) as part, _storage_error(target, "; it is left as it was"):
        yield part
        _fsync(part)
        os.chmod(part, 0o666 & ~_umask())  # mkstemp made it private; give it the mode an ordinary open() would
        os.replace(part, target)
        _fsync(target.parent)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; on success rename it to `path`, replacing a folder there.

    Raises:
        StorageError: as `atomic_write`.
    """
    target = Path(path)
    with _part_of(target, is_folder=True) as part, _storage_error(target, "; it is left as it was"):
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                os.chmod(file, 0o666 & ~_umask())  # safetensors makes private ones, which a server may not read
                _fsync(file)
        os.chmod(part, 0o777 & ~_umask())
        if target.exists():
            exchange(part, target)
        else:
            os.replace(part, target)
        _fsync(target.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        CheckpointError: the file is missing, is not UTF-8 or JSON (with line and column), repeats a key in one object,
            or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: there is no {path.name} here") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object's (key, value) pairs as a dict: the `object_pairs_hook` of strict reading.

    RFC 8259 leaves the meaning of a repeated key open. Python keeps the last value and says nothing.

    Raises:
        ValueError: a key is repeated; the message names it.
    """
    values = dict(pairs)
    if len(values) != len(pairs):
        repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f'an object repeats the key "{repeated}"')
    return values


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes as lower-case hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_space(folder: Path, needed: int) -> None:
    """Make sure that `needed` bytes fit on the disk of a folder, which may not exist yet.

    Raises:
        StorageError: they do not.
    """
    existing = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if needed > (free := shutil.disk_usage(existing).free):
        raise StorageError(f"cannot write {folder}: {needed:,} bytes are needed, {free:,} are free")


def finite(value: Any) -> Any:
    """Return a JSON value with None for each NaN and infinity, which JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def exchange(first: Path, second: Path) -> None:
    """Let two folders of one parent change their names, in one step where the system can (Linux, macOS).

    Elsewhere it takes three, and a kill between them leaves `second` under a hidden name that ends in ".old".

    Raises:
        OSError: one of them is not a folder, or they cannot be renamed.
    """
    for one in (first, second):
        if not one.is_dir() or one.is_symlink():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(one))
    if _exchanged(first, second):
        return
    old = Path(tempfile.mkdtemp(prefix=f".{second.name}.", suffix=".old", dir=second.parent))
    try:
        os.replace(second, old)  # rename onto an empty folder is atomic
    except OSError:
        old.rmdir()
        raise
    try:
        os.replace(first, second)
    except OSError:
        os.replace(old, second)
        raise
    os.replace(old, first)


def _exchanged(first: Path, second: Path) -> bool:
    """Exchange two names by the system's own call; return False where it has none."""
    if sys.platform == "win32":
        return False
    library = ctypes.CDLL(None, use_errno=True)
    source, target = os.fsencode(first), os.fsencode(second)
    if hasattr(library, "renameat2"):
        failed = library.renameat2(-100, source, -100, target, 2)  # AT_FDCWD, RENAME_EXCHANGE
    elif hasattr(library, "renamex_np"):
        failed = library.renamex_np(source, target, 2)  # RENAME_SWAP
    else:
        return False
    if failed and (code := ctypes.get_errno()) not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        raise OSError(code, os.strerror(code), str(second))
    return not failed


@contextlib.contextmanager
def _part_of(target: Path, is_folder: bool) -> Iterator[Path]:
    """Yield a new hidden file or folder beside a target, locked while it is written, and remove it at the end."""
    with _storage_error(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        part, handle = _new_part(target, is_folder)
    try:
        yield part
    finally:
        if is_folder:
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


def _new_part(target: Path, is_folder: bool) -> tuple[Path, int | None]:
    """Make a locked file or folder beside a target; return it with the handle that has the lock."""
    where: dict[str, Any] = {"prefix": f".{target.name}.", "suffix": ".part", "dir": target.parent}
    if sys.platform == "win32":  # which renames nothing that is open
        if is_folder:
            return Path(tempfile.mkdtemp(**where)), None
        handle, name = tempfile.mkstemp(**where)
        os.close(handle)
        return Path(name), None
    while True:
        if is_folder:
            name = tempfile.mkdtemp(**where)
            try:
                handle = os.open(name, os.O_RDONLY)
            except FileNotFoundError:  # another process swept it before it was locked
                continue
        else:
            handle, name = tempfile.mkstemp(**where)
        if try_lock(handle) is not False and is_at(handle, Path(name)):
            return Path(name), handle
        os.close(handle)


def _sweep(target: Path) -> None:
    """Remove what killed processes had begun to write beside a target, under its name or one with another number."""
    if sys.platform == "win32":  # which has no lock that tells whether somebody is writing
        return
    beside: list[tuple[Path, re.Match[str] | None]] = []
    with contextlib.suppress(OSError):  # a folder that may be written but not read
        beside = [(entry, re.fullmatch(r"\.(.+)\.[^.]+\.part", entry.name)) for entry in target.parent.iterdir()]
    for entry, named in beside:
        if named is None or _series(named[1]) != _series(target.name):
            continue
        with contextlib.suppress(OSError):  # another process was faster
            handle = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if try_lock(handle):  # nobody is writing it
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            finally:
                os.close(handle)


def _series(name: str) -> str:
    return re.sub(r"\d+", "0", name)  # step-000003 and step-000006 are of one series


@contextlib.contextmanager
def _storage_error(target: Path, state: str = "") -> Iterator[None]:
    """Within the context, turn a failure to write `target` into a StorageError that ends with the target's `state`."""
    try:
        yield
    except StorageError:
        raise
    except _WRITE_ERRORS as error:
        raise StorageError(f"cannot write {target}: {_reason(error)}{state}") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _fsync(path: Path) -> None:
    if path.is_dir() and sys.platform == "win32":
        return  # Windows cannot open a folder for flushing
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
