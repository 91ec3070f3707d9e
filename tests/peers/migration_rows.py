"""The migration pages' tables: rows of code for two libraries, read from the page and run."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PAGES = Path(__file__).parents[2] / "docs" / "how-to"
Names = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One row of a table: its section's heading, its first cell, and the code of both sides."""

    section: str
    task: str
    theirs: str
    ours: str

    def __str__(self) -> str:
        return self.task


def rows_of(page: str) -> list[Row]:
    """Return the rows of all tables of a page, without their heads."""
    rows, section = [], ""
    for line in (PAGES / page).read_text(encoding="utf-8").splitlines():
        section = line.removeprefix("## ") if line.startswith("## ") else section
        if line.startswith("|") and not line.startswith("|---"):
            task, theirs, ours = (cell.strip() for cell in line.strip("|").split("|"))
            if task not in ("for", "to"):  # the head of a table
                rows.append(Row(section, task, code(theirs), code(ours)))
    return rows


def code(cell: str) -> str:
    """The lines in backticks; a cell has nothing else but line breaks."""
    lines = cell.split("<br>")
    assert all(re.fullmatch(r"`[^`]+`", line) for line in lines), cell
    return "\n".join(line.strip("`") for line in lines)


def run(row: Row, sides: tuple[Names, Names]) -> tuple[str, str]:
    """Run both columns; return what they print."""
    printed = []
    for text, names in zip((row.theirs, row.ours), sides, strict=True):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            torch.manual_seed(0)
            exec(text, names)
        printed.append(output.getvalue())
    return printed[0], printed[1]
