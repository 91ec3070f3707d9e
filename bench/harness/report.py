"""The report of a measurement: a table of results with targets, and the options --check, --json, --plot."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.harness.plot import Picture, draw, file_to_draw

PEERS = ("bitsandbytes", "torchao", "peft", "transformers", "triton")
NOT_INSTALLED = "not installed"
INSTRUCTIONS = ("avx2", "avx512_f", "avx512_bw", "avx512_vbmi", "avx512_bf16", "amx_bf16")
_PLACES = ("--json", "--plot", "--plots", "--folder", "--markdown")  # options that name files or folders to write
MANY = 30  # targets; of more than these, only the missed ones are listed


@dataclass(frozen=True)
class Target:
    """A figure that must hold.

    Attributes:
        name: name of the figure.
        value: the measured value.
        limit: the largest value allowed, or with `at_least` the smallest.
    """

    name: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the value is within the limit; NaN is not."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def arguments(description: str, plots: bool = False) -> argparse.ArgumentParser:
    """Return a parser with the options of all measurements, and --plot for those that have a picture."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 if a target is missed")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    if plots:
        parser.add_argument("--plot", type=file_to_draw, help="draw the figures: a .png or .svg file")
    return parser


def finish(
    options: argparse.Namespace, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]],
    targets: Sequence[Target] = (), picture: Picture | None = None, *, device: torch.device | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Print the table and the targets, write the files, and exit 1 under --check if a target is missed.

    Args:
        more: further content of the JSON file.
    """
    console = Console(width=120 if not sys.stdout.isatty() else None)
    table = Table(title=escape(title), title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(escape(column), no_wrap=place < 2)
    for row in rows:
        table.add_row(*(escape(text(cell)) for cell in row))
    console.print(table)
    for target in targets:
        if target.met and len(targets) > MANY:
            continue
        relation = "at least" if target.at_least else "at most"
        verdict = "ok" if target.met else "MISSED"
        console.print(f"{verdict:<7}{escape(target.name)}: {target.value:.4g} ({relation} {target.limit:.4g})")
    if len(targets) > MANY:
        console.print(f"{sum(target.met for target in targets)} of {len(targets)} targets are met")
    host = machine(device)
    console.print(escape(in_words(host)), soft_wrap=True)
    figures = {
        "title": title, "command": command(), "machine": host, "columns": list(columns),
        "rows": [dict(zip(columns, row, strict=True)) for row in rows],
        "targets": [asdict(target) | {"met": target.met} for target in targets],
        "picture": picture and asdict(picture),
    } | dict(more or {})  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if picture and getattr(options, "plot", None):
        draw(picture, title, options.plot)
    if options.check and not all(target.met for target in targets):
        sys.exit(1)


def text(cell: object) -> str:
    """Return the text of a table's cell: four digits of a number, nothing for None."""
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.4g}"
    return "" if cell is None else str(cell)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown, with columns of numbers aligned to the right."""
    is_number = [all(isinstance(row[place], int | float | None) for row in rows) for place in range(len(columns))]
    lines = [list(columns), ["---:" if number else "---" for number in is_number]]
    lines += [[text(cell).replace("|", r"\|") for cell in row] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def milliseconds(seconds: Mapping[str, float], name: str) -> float | str:
    """Return a median in ms, or `NOT_INSTALLED`."""
    return 1e3 * seconds[name] if name in seconds else NOT_INSTALLED


def ratio(seconds: Mapping[str, float], slow: str, fast: str) -> float | None:
    """Return the ratio of two contenders' times; None if one is not installed."""
    return seconds[slow] / seconds[fast] if slow in seconds and fast in seconds else None


def command() -> str:
    """Return the command line, without the options that name output files; data files by their names alone."""
    script = Path(sys.argv[0])
    name = script.parent.name if script.stem == "__main__" else script.stem  # bench.gpu is a room with a command
    words, kept = iter(sys.argv[1:]), ["python", "-m", f"bench.{name}"]
    for word in words:
        if word in _PLACES:
            next(words, None)
        elif not word.startswith((*(f"{place}=" for place in _PLACES), "--check")):
            kept.append(Path(word).name if Path(word).is_absolute() and Path(word).suffix else word)
    return shlex.join(kept)


def machine(device: torch.device | None = None) -> dict[str, str | int]:
    """Return the date and the machine of a measurement: processor or GPU, instruction sets, threads, versions."""
    found: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    names = [name for name in INSTRUCTIONS if found.get(name)] or [torch.backends.cpu.get_cpu_capability()]
    result: dict[str, str | int] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": str(found.get("cpu_name") or platform.processor() or platform.machine()),
        "cores": int(str(found.get("num_physical_cores") or os.cpu_count() or 1)),
        "instructions": " ".join(names),
        "threads": torch.get_num_threads(),
    }
    if device is not None and device.type != "cpu":
        result["gpu"] = torch.get_device_module(device).get_device_name(device)
    result |= {name: os.environ[name] for name in ("LORAKIT_BACKEND", "LORAKIT_CPU_ISA") if name in os.environ}
    return result | versions()


def versions() -> dict[str, str]:
    """Return the versions of Python, PyTorch and the peers."""
    result = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PEERS:
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            result[name] = NOT_INSTALLED
    return result


def in_words(host: Mapping[str, str | int]) -> str:
    """Return a machine in one line."""
    first = f"{host['date']}, {host['processor']}, {host['cores']} cores, {host['threads']} threads"
    rest = [f"{name} {value}" for name, value in host.items() if name not in ("date", "processor", "cores", "threads")]
    return ", ".join([first, *rest])
