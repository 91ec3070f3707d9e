"""What every measurement shares: a table of results with targets, --check, --json."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Target:
    """A figure that must hold.

    Attributes:
        name: what is measured.
        value: what was seen.
        limit: what it may be at the most (or at the least, with `at_least`).
    """

    name: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the figure holds."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all measurements take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser


def finish(
    options: argparse.Namespace, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]],
    targets: Sequence[Target] = (),
) -> None:  # fmt: skip
    """Print the table and the targets, write the JSON file, and exit 1 under --check where a target is missed."""
    console = Console(width=120 if not sys.stdout.isatty() else None)
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    console.print(table)
    for target in targets:
        relation = "at least" if target.at_least else "at most"
        verdict = "ok" if target.met else "MISSED"
        console.print(f"{verdict:<7}{target.name}: {target.value:.4g} ({relation} {target.limit:.4g})")
    console.print(f"{machine()}")
    if options.json:
        figures = {
            "title": title, "machine": machine(), "rows": [dict(zip(columns, row, strict=True)) for row in rows],
            "targets": [asdict(target) | {"met": target.met} for target in targets],
        }  # fmt: skip
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if options.check and not all(target.met for target in targets):
        sys.exit(1)


def machine() -> str:
    """Return what the figures were measured on, in one line."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {capability}, {torch.get_num_threads()} threads, torch {torch.__version__}"
