"""Where the commands print."""

from __future__ import annotations

from rich.console import Console

console = Console(highlight=False, emoji=False)  # text is shown as it is: ":key:" must not become a picture


def say(text: str) -> None:
    """Print a text as it is: no markup in it, no line breaks added."""
    console.print(text, markup=False, soft_wrap=True)
