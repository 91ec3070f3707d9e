"""`Printed`: results that print as a few sentences or a short table, not as all of their numbers."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 120  # characters of a line, wherever the text goes


class Printed:
    """A result whose `__str__` is what people want to see; `repr`, for a REPL and inside lists, is its first line."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {str(self).partition(chr(10))[0]}>"


def as_text(print_to: Callable[[Console], None]) -> str:
    """Return what a function prints to a console, as plain text."""
    from rich.console import Console  # here, since importing it takes longer than most of lorakit

    console = Console(file=StringIO(), width=WIDTH, color_system=None, highlight=False, emoji=False)
    print_to(console)
    assert isinstance(console.file, StringIO)
    lines = console.file.getvalue().rstrip().split("\n")
    return "\n".join(line.rstrip() for line in lines)
