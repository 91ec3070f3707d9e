"""Files that are whole or absent: atomic writes, strict JSON reading and hashes.

Everything lorakit writes goes through `atomic_write` or `atomic_folder`. They write beside the target, flush to disk,
then rename. A crash, a kill or a full disk leaves the old content or nothing, never half of the new.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import CheckpointError, StorageError

_WRITE_ERRORS = (OSError, SafetensorError)  # safetensors does not raise OSError when the disk is full


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it over `path`.

    Raises:
        StorageError: the target's folder cannot be written or the disk is full; `path` is as it was.
    """
    target = Path(path)
    with _storage_error(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        os.close(handle)
    part = Path(name)
    try:
        with _storage_error(target, "; it is left as it was"):
            yield part
            _fsync(part)
            os.chmod(part, 0o666 & ~_umask())  # mkstemp made it private; give it the mode an ordinary open() would
            os.replace(part, target)
            _fsync(target.parent)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; on success rename it to `path`, replacing a folder there.

    Raises:
        StorageError: as `atomic_write`.
    """
    target = Path(path)
    with _storage_error(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        with _storage_error(target, "; it is left as it was"):
            yield part
            for file in part.rglob("*"):
                if file.is_file():
                    os.chmod(file, 0o666 & ~_umask())  # safetensors makes private ones, which a server may not read
                    _fsync(file)
            os.chmod(part, 0o777 & ~_umask())
            if target.exists():
                _swap(part, target)
            else:
                os.replace(part, target)
            _fsync(target.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


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


def _swap(part: Path, target: Path) -> None:
    """Replace the folder `target` with the folder `part`; put `target` back if that fails."""
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    try:
        os.replace(target, old)  # rename onto an empty folder is atomic
    except OSError:
        old.rmdir()
        raise
    try:
        os.replace(part, target)
    except OSError:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


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
