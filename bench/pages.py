"""Writes docs/benchmarks/kernels.md and its pictures from the measurements' JSON files, which lie beside it.

Each section is the measurement's own description, its command, the machine and versions, the table and the picture;
nothing on the page is written by hand. `--run` takes all measurements anew, one after another, each in a process of its
own (about ten minutes on two cores that do nothing else).

Run as: python -m bench.pages [--run] [--only decode,quantize] [--folder docs/benchmarks]
"""

from __future__ import annotations

import argparse
import ast
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.files import write_text

from . import plot
from .report import Picture, in_words, markdown

PAGE = "kernels.md"


@dataclass(frozen=True)
class Section:
    """A measurement on the page.

    Attributes:
        module: of this package; its JSON file and picture have this name.
        title: of the section.
        shown: of a long table, the values of a column whose rows are shown; the file has all.
    """

    module: str
    title: str
    shown: tuple[str, tuple[str, ...]] | None = None


SECTIONS = (
    Section("dequantize", "Dequantizing"),
    Section("quantize", "Quantizing"),
    Section("linear4bit", "A layer in training"),
    Section("decode", "A layer in generation"),
    Section("static_gpu", "Triton kernels, compiled but not run", ("target", ("sm_90", "gfx942"))),
)
OPENING = """# Kernels

<!-- Written by `python -m bench.pages`; change the measurements, not this page. -->

How these figures are taken is said in [Benchmarks](index.md). Times are medians in milliseconds; a target that was
missed is listed below its table.
"""


def main() -> None:
    """Measure where asked to, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="take the measurements anew")
    parser.add_argument("--only", help="measurements to take, with commas between them")
    parser.add_argument("--folder", type=Path, default=Path("docs/benchmarks"), help="where the page is")
    options = parser.parse_args()
    names = [section.module for section in SECTIONS]
    chosen = options.only.split(",") if options.only else names
    if unknown := set(chosen) - set(names):
        parser.error(f"no measurement is called {', '.join(sorted(unknown))} (known: {', '.join(names)})")
    if options.run:
        run(options.folder, chosen)
    try:
        write(options.folder)
    except FileNotFoundError as error:
        sys.exit(str(error))


def run(folder: Path, names: Sequence[str]) -> None:
    """Take measurements, which write their JSON files into the folder.

    Raises:
        SystemExit: one failed. The files of those before it are written.
    """
    plot.file_to_draw(str(folder / "a.svg"))  # matplotlib is missed now rather than at the end
    for name in names:
        start, part = time.perf_counter(), folder / f"{name}.json.part"
        status = subprocess.run([sys.executable, "-m", f"bench.{name}", "--json", str(part)]).returncode
        if status:
            part.unlink(missing_ok=True)
            sys.exit(f"bench.{name} failed with exit status {status}")
        part.replace(folder / f"{name}.json")
        print(f"bench.{name}: {time.perf_counter() - start:.0f} s", flush=True)


def write(folder: Path) -> None:
    """Write the page and its pictures from the JSON files in the folder.

    Raises:
        FileNotFoundError: one of them is missing; the page is not touched.
    """
    found = [(section, read(folder, section.module)) for section in SECTIONS]
    for section, figures in found:
        plot.draw(Picture(**figures["picture"]), figures["title"], folder / f"{section.module}.svg")
    write_text(folder / PAGE, OPENING + "".join(in_markdown(section, figures) for section, figures in found))


def read(folder: Path, module: str) -> dict[str, Any]:
    """Return the figures of a measurement.

    Raises:
        FileNotFoundError: there are none, with the command that takes them.
    """
    file = folder / f"{module}.json"
    if not file.exists():
        command = shlex.join(["python", "-m", f"bench.{module}", "--json", str(file)])
        raise FileNotFoundError(f"{file} is missing; take the measurement: {command}")
    figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return figures


def in_markdown(section: Section, figures: dict[str, Any]) -> str:
    """Return a section of the page."""
    rows, note = figures["rows"], ""
    if section.shown:
        column, values = section.shown
        rows = [row for row in rows if row[column] in values]
        note = f"The rows of {' and '.join(values)}; the file has the others.\n\n"
    missed = [target for target in figures["targets"] if not target["met"]]
    met = f"{len(figures['targets']) - len(missed)} of {len(figures['targets'])} targets are met"
    names = "; ".join(f"{target['name']} ({target['value']:.3g}, not {target['limit']:.3g})" for target in missed)
    return (
        f"\n## {section.title}\n\n{description(section.module)}\n    {figures['command']}\n\n{note}"
        f"{markdown(figures['columns'], [list(row.values()) for row in rows])}\n"
        f"{met}{f'. Missed: {names}' if missed else ''}.\n\n"
        f"![{figures['title']}]({section.module}.svg)\n\n"
        f"*{in_words(figures['machine'])}. All figures: [{section.module}.json]({section.module}.json).*\n"
    )


def description(module: str) -> str:
    """Return what a measurement says of itself, without how to run it; read, as importing it may need a peer."""
    source = (Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8")
    text = ast.get_docstring(ast.parse(source)) or ""
    return text.partition("Run as:")[0].rstrip() + "\n"


if __name__ == "__main__":
    main()
