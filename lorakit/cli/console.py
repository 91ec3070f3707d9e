"""What the commands share: the console that they print to, and how they end and treat what is there already."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import StorageError

Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what is there already")]

console = Console(highlight=False, emoji=False)  # ":key:" must not become a picture


def say(text: str) -> None:
    """Print a text unchanged: without reading markup and without adding line breaks."""
    console.print(text, markup=False, soft_wrap=True)


class Interrupted(Exception):
    """The user interrupted a command; the text says how to go on."""


def check_target(path: Path, overwrite: bool) -> None:
    """Make sure that a command does not write over something unasked.

    Raises:
        StorageError: there is something at `path`, which is not to be replaced.
    """
    is_there = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if is_there and not overwrite:
        raise StorageError(f"{path} exists already; name another, or replace it with --overwrite")
