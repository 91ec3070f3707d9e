"""The ready-made data sets that `lorakit data build` knows, one file and one line in a table each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import ConfigError, did_you_mean
from .chatterbot import build_chatterbot

# name -> (folder, seed of the split) -> report; its str() says what was written
DATA_SETS: dict[str, Callable[[Path, int], object]] = {"chatterbot": build_chatterbot}


def build_data_set(name: str, folder: Path, seed: int = 0) -> object:
    """Write a data set into a folder; return its report, whose `str()` is readable.

    Raises:
        ConfigError: there is no data set of this name.
        DataError: the package that it is made from is not installed.
        StorageError: the folder cannot be written.
    """
    if name not in DATA_SETS:
        raise ConfigError(f"no data set '{name}'{did_you_mean(name, DATA_SETS)} (known: {', '.join(DATA_SETS)})")
    return DATA_SETS[name](folder, seed)
