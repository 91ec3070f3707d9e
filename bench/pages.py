"""Writes the pages kernels.md, training.md and adapters.md of docs/benchmarks, with pictures, from their JSON files.

Each section has the measurement's own description, its command, the machine and versions, the table and the picture.
Nothing on these pages is written by hand. `--run` repeats the measurements of a page one after another, each in its own
process. The kernels take about ten minutes on two otherwise idle cores, training takes more than an hour.

Pages of docs/explanation that quote a study are written by hand, except for their pictures and the tables between
markers, which this module writes.

Run as: python -m bench.pages [--run] [--page kernels] [--only decode,quantize] [--folder docs/benchmarks]
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness.plot import Picture, draw, file_to_draw
from bench.harness.report import in_words, markdown
from bench.studies import study_plots
from lorakit.files import write_text


@dataclass(frozen=True)
class Section:
    """A measurement on a page.

    Attributes:
        module: name of the measurement's module in this package.
        title: heading of the section.
        name: name of its JSON file and its picture; by default the module's.
        arguments: arguments of the command.
        shown: for a long table, a column and the values whose rows are shown; the file has all rows.
        draws: whether the measurement draws its picture itself; then the JSON file does not hold it.
    """

    module: str
    title: str
    name: str = ""
    arguments: tuple[str, ...] = ()
    shown: tuple[str, tuple[str, ...]] | None = None
    draws: bool = False

    @property
    def file(self) -> str:
        """Name of its files, without suffix."""
        return self.name or self.module


@dataclass(frozen=True)
class Page:
    """A page: its opening text and its sections."""

    title: str
    opening: str
    sections: tuple[Section, ...]


PAGES = {
    "kernels": Page(
        "Kernels",
        "Times are medians in milliseconds.",
        (
            Section("dequantize", "Dequantizing"),
            Section("quantize", "Quantizing"),
            Section("linear4bit", "A layer in training"),
            Section("decode", "A layer in generation"),
            Section(
                "static_gpu", "Triton kernels, compiled but not run", shown=("target", ("sm_90", "gfx942"))
            ),
        ),
    ),
    "training": Page(
        "Training",
        "The peers' side of each comparison is a separate script in `bench/training/sides/`, with their best settings. "
        "[Where a training step spends its time and memory](../explanation/training-step.md) explains what bounds a "
        "step.",
        (
            Section("train_step", "One step", arguments=("--rounds", "4", "--steps", "3")),
            Section(
                "train_step", "One step of a model with a billion weights", "train_step_1b",
                ("--model", "llama-1b", "--rounds", "1", "--steps", "1"),
            ),
            Section("train_step", "One step with dropout", "train_step_dropout", ("--dropout", "0.05")),
            Section("sft", "A fine-tune beside TRL", arguments=("--data", "us_addresses.jsonl")),
            Section("step_7b", "Seven billion weights"),
            Section("scaling", "Memory by length and by vocabulary", draws=True),
            Section("plan", "Predicted and measured memory"),
            Section("plan_sizes", "Plans for large models, beside published figures"),
            Section("profile_step", "Where the time of a step goes"),
            Section("tricks", "What each trick is worth", arguments=("--rounds", "2", "--steps", "3")),
        ),
    ),
    "adapters": Page(
        "Adapters",
        "The share of an update that a merge keeps, and the cost of DoRA, switching, probes and inspection.",
        (
            Section("merge", "What survives a merge"),
            Section(
                "merge", "Scores of a merged adapter", "merge_task", ("--adapter", "runs/quickstart", "--rows", "50")
            ),
            Section("dora", "A step of DoRA", arguments=("--rounds", "2", "--steps", "1")),
            Section("swap", "Switching, and an adapter for each row"),
            Section("probes", "Probes while training"),
            Section(
                "inspect", "Looking inside",
                arguments=("--gradience", "../gradience/bin/python", "--adapter", "runs/quickstart/adapter"),
            ),
            Section("llama_cpp", "In llama.cpp"),
        ),
    ),
}  # fmt: skip
EXPLAINED = {"study": "inside-an-adapter"}  # measurement -> page of docs/explanation that quotes it
MARKERS = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
WRITTEN = """
<!-- Written by `python -m bench.pages`; change the measurements, not this page. -->

[Benchmarks](index.md) describes how these figures are measured. A missed target is listed below its table.
"""


def main() -> None:
    """Measure if asked to, and write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="repeat the measurements")
    parser.add_argument("--page", choices=PAGES, default="kernels", help="page whose measurements to run")
    parser.add_argument("--only", help="measurements to run, separated by commas")
    parser.add_argument("--folder", type=Path, default=Path("docs/benchmarks"), help="folder of the pages")
    options = parser.parse_args()
    sections = {section.file: section for section in PAGES[options.page].sections}
    chosen = options.only.split(",") if options.only else list(sections)
    if unknown := set(chosen) - set(sections):
        parser.error(f"no measurement is called {', '.join(sorted(unknown))} (known: {', '.join(sections)})")
    if options.run:
        run(options.folder, [sections[name] for name in chosen])
    try:
        write(options.folder)
        for name, page in EXPLAINED.items():
            fill(options.folder / f"{name}.json", options.folder.parent / "explanation" / f"{page}.md")
    except FileNotFoundError as error:
        sys.exit(str(error))


def run(folder: Path, sections: Sequence[Section]) -> None:
    """Run measurements, which write their JSON files into the folder.

    Raises:
        SystemExit: a measurement failed; the files of earlier ones are written.
    """
    file_to_draw(str(folder / "a.svg"))  # fail now, rather than at the end, if matplotlib is missing
    for section in sections:
        start, part = time.perf_counter(), folder / f"{section.file}.json.part"
        command = [sys.executable, "-m", f"bench.{section.module}", *section.arguments, "--json", str(part)]
        command += ["--plot", str(folder / f"{section.file}.svg")] if section.draws else []
        status = subprocess.run(command).returncode
        if status:
            part.unlink(missing_ok=True)
            sys.exit(f"bench.{section.module} failed with exit status {status}")
        part.replace(folder / f"{section.file}.json")
        print(f"{section.file}: {time.perf_counter() - start:.0f} s", flush=True)


def write(folder: Path) -> None:
    """Write the pages and their pictures from the JSON files in the folder.

    Raises:
        FileNotFoundError: a file is missing; no page is changed.
    """
    measured = {name: [(section, read(folder, section)) for section in page.sections] for name, page in PAGES.items()}
    for name, page in PAGES.items():
        parts = [f"# {page.title}\n{WRITTEN}{page.opening}\n"]
        for section, figures in measured[name]:
            if figures["picture"]:
                draw(Picture(**figures["picture"]), figures["title"], folder / f"{section.file}.svg")
            parts.append(in_markdown(section, figures))
        write_text(folder / f"{name}.md", "".join(parts))


def fill(measured: Path, page: Path) -> None:
    """Replace a study's tables in the page that quotes it, and draw its pictures beside its JSON file.

    Raises:
        FileNotFoundError: one of the two files is missing.
        KeyError: the page asks for a table that was not measured; it is not changed.
    """
    figures = json.loads(measured.read_text(encoding="utf-8"))

    def quoted(match: re.Match[str]) -> str:
        return f"{match[1]}\n{quotation(figures, match[2])}\n{match[3]}"

    text = MARKERS.sub(quoted, page.read_text(encoding="utf-8"))
    study_plots.draw(figures, measured.parent)
    write_text(page, text)


def quotation(figures: dict[str, Any], name: str) -> str:
    """Return a table of a study; "taken": its command, conditions and machine."""
    if name != "taken":
        return markdown(figures[name]["columns"], figures[name]["rows"])
    return f"    {figures['command']}\n\n{figures['title']}. *{in_words(figures['machine'])}.*\n"


def read(folder: Path, section: Section) -> dict[str, Any]:
    """Return the figures of a measurement.

    Raises:
        FileNotFoundError: there are none; the message has the command that measures them.
    """
    file = folder / f"{section.file}.json"
    if not file.exists():
        command = shlex.join(["python", "-m", f"bench.{section.module}", *section.arguments, "--json", str(file)])
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
    name = section.file
    drawn = f"![{figures['title']}]({name}.svg)\n\n" if figures["picture"] or section.draws else ""
    what = "" if section.name else f"{description(section.module)}\n"  # once, in the module's first section
    return (
        f"\n## {section.title}\n\n{what}    {figures['command']}\n\n"
        f"{figures['title']}.\n\n{note}"
        f"{markdown(figures['columns'], [list(row.values()) for row in rows])}\n{verdict(figures['targets'])}{drawn}"
        f"*{in_words(figures['machine'])}. All figures: [{name}.json]({name}.json).*\n"
    )


def verdict(targets: Sequence[dict[str, Any]]) -> str:
    """Return the number of targets that are met, and the names of those that are not."""
    if not targets:
        return ""
    missed = [target for target in targets if not target["met"]]
    names = "; ".join(f"{target['name']} ({target['value']:.3g}, not {target['limit']:.3g})" for target in missed)
    met = f"{len(targets) - len(missed)} of {len(targets)} targets are met"
    return f"{met}{f'. Missed: {names}' if missed else ''}.\n\n"


def description(module: str) -> str:
    """Return a measurement's docstring up to "Run as:", without importing the module, which may need a peer."""
    found = importlib.util.find_spec(f"bench.{module}")
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"bench has no module {module}")
    text = ast.get_docstring(ast.parse(Path(found.origin).read_text(encoding="utf-8"))) or ""
    return text.partition("Run as:")[0].rstrip() + "\n"


if __name__ == "__main__":
    main()
