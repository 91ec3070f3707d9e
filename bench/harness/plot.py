"""Draws a measurement: horizontal bars in groups, with marks for references such as a copy.

The colors are Okabe and Ito's, which color-blind people can tell apart. Bars also have hatching and numbers, so that a
picture is readable in grey. Only this module imports matplotlib, when it draws.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SUFFIXES = (".png", ".svg")
LOOKS = {  # a contender's color and hatching, the same in all pictures
    "lorakit": ("#0072B2", ""), "reused buffer": ("#0072B2", ""), "fresh": ("#56B4E9", "///"),
    "bitsandbytes": ("#E69F00", "|||"), "torchao": ("#009E73", "\\\\\\"), "dense": ("#999999", ""),
}  # fmt: skip
OTHERS = (("#0072B2", ""), ("#E69F00", "|||"), ("#009E73", "\\\\\\"), ("#CC79A7", "///"), ("#56B4E9", ""))
MARKS = ("-", (0, (2, 1.2)))  # line styles of marks
LOG_RANGE = 8.0  # above this ratio of the longest to the shortest bar, the axis is logarithmic
BAR_INCHES = 0.17
LEGEND_LETTERS = 80  # room in a row of the legend
STYLE: Any = {
    "font.size": 9, "font.family": "DejaVu Sans", "svg.fonttype": "path", "svg.hashsalt": "lorakit",
    "hatch.linewidth": 0.5, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
}  # fmt: skip


@dataclass
class Picture:
    """The content of a plot: groups of bars, and marks across a group.

    Attributes:
        unit: unit of the numbers.
        bars: group -> bar -> number.
        marks: group -> mark -> number; references to compare the bars with, such as a copy.
    """

    unit: str
    bars: dict[str, dict[str, float]] = field(default_factory=dict)
    marks: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, group: str, seconds: Mapping[str, float], bars: Sequence[str], marks: Sequence[str]) -> None:
        """Add a group of times in ms; bars that were not measured are left out."""
        self.bars[group] = {name: 1e3 * seconds[name] for name in bars if name in seconds}
        self.marks[group] = {name: 1e3 * seconds[name] for name in marks}


def file_to_draw(name: str) -> Path:
    """Return the path of a picture after checking that it can be drawn, before minutes are spent on measuring.

    Raises:
        argparse.ArgumentTypeError: its suffix is not .png or .svg, its folder is missing, or matplotlib is.
    """
    file = Path(name)
    if file.suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"'{name}' must end in {' or '.join(SUFFIXES)}")
    if not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder '{file.parent}' for '{file.name}'")
    if not _has_matplotlib():
        raise argparse.ArgumentTypeError("drawing needs matplotlib: pip install -c constraints.txt -e '.[bench]'")
    return file


def draw(picture: Picture, title: str, file: Path) -> None:
    """Write the picture as PNG or SVG; the same figures give the same SVG, byte for byte."""
    from matplotlib.lines import Line2D

    height = sum(len(bars) + 1 for bars in picture.bars.values()) * BAR_INCHES + 1.3
    with canvas(file, 8.4, height) as figure:
        axes = figure.add_subplot()
        _bars(axes, picture)
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        _axis(axes, picture)
        handles, labels = axes.get_legend_handles_labels()
        bars_first = sorted(zip(handles, labels, strict=True), key=lambda entry: isinstance(entry[0], Line2D))
        handles, labels = zip(*bars_first, strict=True)
        columns = max(1, min(6, len(labels), LEGEND_LETTERS // max(map(len, labels))))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


@contextlib.contextmanager
def canvas(file: Path, width: float, height: float) -> Iterator[Any]:
    """Yield an empty matplotlib figure of a size in inches, then write it as PNG or SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
        yield figure
        stable: dict[str, Any] = {"metadata": {"Date": None}} if file.suffix == ".svg" else {"dpi": 144}
        figure.savefig(file, **stable)


def _bars(axes: Any, picture: Picture) -> None:
    """Draw the groups from the top down, one row a bar, and the marks across their groups."""
    names = list(dict.fromkeys(name for bars in picture.bars.values() for name in bars))
    marks = list(dict.fromkeys(name for marks in picture.marks.values() for name in marks))
    labelled: set[str] = set()
    row, centers = 0.0, []
    for group, bars in picture.bars.items():
        for place, (name, value) in enumerate(bars.items()):
            color, hatch = LOOKS.get(name) or OTHERS[names.index(name) % len(OTHERS)]
            axes.barh(
                row + place, value, height=0.86, color=color, hatch=hatch, edgecolor="white", linewidth=0,
                label=None if name in labelled else name, zorder=2,
            )  # fmt: skip
            axes.annotate(
                f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}", (value, row + place), xytext=(3, 0),
                textcoords="offset points", va="center", fontsize=7, zorder=4,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
            )  # fmt: skip
            labelled.add(name)
        for name, value in picture.marks.get(group, {}).items():
            axes.plot(
                [value, value], [row - 0.6, row + len(bars) - 0.4], color="black", linewidth=1.4, zorder=3,
                linestyle=MARKS[marks.index(name) % len(MARKS)], label=None if name in labelled else name,
            )  # fmt: skip
            labelled.add(name)
        centers.append(row + (len(bars) - 1) / 2)
        row += len(bars) + 1
    axes.set_yticks(centers, list(picture.bars))
    axes.set_ylim(row - 1.3, -0.9)
    axes.tick_params(axis="y", length=0)


def _axis(axes: Any, picture: Picture) -> None:
    """Make the numbers' axis logarithmic if they differ a lot, and leave room for the longest bar's number."""
    values = [value for bars in picture.bars.values() for value in bars.values()]
    values += [value for marks in picture.marks.values() for value in marks.values()]
    positive = [value for value in values if value > 0]
    axes.grid(axis="x", color="#dddddd", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    if positive and max(positive) / min(positive) > LOG_RANGE:
        axes.set_xscale("log")
        axes.set_xlim(10 ** (math.floor(10 * math.log10(min(positive)) - 2) / 10), max(positive) * 1.5)
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.set_xlabel(f"{picture.unit}, logarithmic")
    else:
        axes.set_xlim(0, max(positive, default=1) * 1.1)
        axes.set_xlabel(picture.unit)


def _has_matplotlib() -> bool:
    try:
        return importlib.util.find_spec("matplotlib") is not None
    except ValueError:  # an entry of sys.modules that is not a module
        return False
