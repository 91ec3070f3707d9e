"""The console that the commands print to."""

from __future__ import annotations

from rich.console import Console

console = Console(highlight=False, emoji=False)  # ":key:" must not become a picture


def say(text: str) -> None:
    """Print a text unchanged: without reading markup and without adding line breaks."""
    console.print(text, markup=False, soft_wrap=True)
