"""Draws the study's figures from its JSON file alone: five SVGs, in the colors and the style of `plot`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness.plot import OTHERS, canvas
from bench.studies.study_figures import KINDS, RANDOM, STEPS, Figures
from bench.studies.study_runs import ALL, RANKS, RATES

COLORS = [color for color, _ in OTHERS]
LINES = ("-", "--", "-.", ":", "-")
MARKERS = ("o", "s", "^", "D", "v")


def draw(figures: Figures, folder: Path) -> None:
    """Write every picture as study_<name>.svg."""
    for name, picture in PICTURES.items():
        picture(figures, folder / f"study_{name}.svg")


def budget(figures: Figures, file: Path) -> None:
    """Draw the held-out loss of each way to spend the budget, and each kind's share in an adapter of all."""
    with canvas(file, 9.0, 3.4) as figure:
        left, right = figure.subplots(1, 2)
        rows = sorted(figures["budget"]["rows"], key=lambda row: -row[3])
        for number, words in enumerate(figures["budget"]["columns"][3:]):
            left.plot(
                [row[3 + number] for row in rows], range(len(rows)), MARKERS[number], color=COLORS[number],
                label=words.removeprefix("loss, "), zorder=2,
            )  # fmt: skip
        left.set_yticks(range(len(rows)), [f"{row[0]}, r={row[1]}" for row in rows])
        left.set_xlabel("held-out loss, nats a token")
        left.set_title("One budget of parameters", loc="left", fontweight="bold")
        left.legend(frameon=False, loc="upper right")
        causal = list(reversed(figures["causal"]["rows"]))
        for offset, (column, words) in enumerate(((2, "lost without it"), (4, "left with it alone"))):
            places = [place + 0.2 - 0.4 * offset for place in range(len(causal))]
            right.barh(
                places, [row[column] for row in causal], height=0.38, color=COLORS[offset], hatch=OTHERS[offset][1],
                edgecolor="white", linewidth=0, label=words, zorder=2,
            )  # fmt: skip
        right.set_yticks(range(len(causal)), [row[0] for row in causal])
        right.set_xlabel("share of what the adapter gains")
        right.set_title("Ablation of the adapter of all-linear", loc="left", fontweight="bold")
        right.legend(frameon=False, loc="upper right")
        for axes in (left, right):
            _grid(axes, "x")


def similarity(figures: Figures, file: Path) -> None:
    """Draw heat maps of φ(i, j) at the middle layer."""
    maps = figures["maps"]
    columns = list(dict.fromkeys(key.partition("|")[2] for key in maps))
    most = max(value for phi in maps.values() for row in phi for value in row)
    with canvas(file, 2.0 * len(columns) + 0.6, 4.6) as figure:
        grid = figure.subplots(len(KINDS), len(columns), squeeze=False)
        for line, kind in zip(grid, KINDS, strict=True):
            for axes, column in zip(line, columns, strict=True):
                phi = maps[f"{kind}|{column}"]
                image = axes.imshow(phi, cmap="cividis", vmin=0, vmax=most, origin="upper", aspect="auto")
                axes.set_xticks(range(0, len(phi[0]), 2), STEPS[: len(phi[0]) : 2], fontsize=7)
                axes.set_yticks(range(0, len(phi), 2), STEPS[: len(phi) : 2], fontsize=7)
                which, _, pair = column.partition("|")
                axes.set_title(f"{which}: {pair}" if pair else which, fontsize=8)
            line[0].set_ylabel(f"{kind}: i leading of the first", fontsize=8)
        figure.supxlabel("j leading directions of the second", fontsize=8)
        figure.colorbar(image, ax=grid, label="φ(i, j)", shrink=0.7)


def layers(figures: Figures, file: Path) -> None:
    """Draw φ(1, 8) over the layers."""
    with canvas(file, 9.0, 3.0) as figure:
        for axes, kind in zip(figure.subplots(1, len(KINDS), sharey=True), KINDS, strict=True):
            names = [key.partition("|")[2] for key in figures["curves"] if key.startswith(f"{kind}|")]
            curves = {name.replace("|", ": "): figures["curves"][f"{kind}|{name}"] for name in names}
            _curves(axes, curves, kind)
            axes.set_ylabel("φ(1, 8)")
            axes.set_ylim(bottom=0)
        _shared_legend(figure, axes)


def amplification(figures: Figures, file: Path) -> None:
    """Draw the amplification factor over the layers, by rank."""
    with canvas(file, 9.0, 3.0) as figure:
        for axes, kind in zip(figure.subplots(1, len(KINDS), sharey=True), KINDS, strict=True):
            names = [key for key in figures["factors"] if key.startswith(f"{kind}|")]
            _curves(axes, {f"r={key.partition('|')[2]}": figures["factors"][key] for key in names}, kind)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.axhline(1, color="black", linewidth=0.8)
            axes.set_ylabel("‖Δ‖ / ‖UᵀWV‖")
        _shared_legend(figure, axes)


def intruders(figures: Figures, file: Path) -> None:
    """Draw intruders by the size of the update and by kind of module, and the general loss over the task's loss.

    The last panel leaves out runs that learned nothing.
    """
    base, *rows = figures["intruders"]["rows"]
    learned = [row for row in rows if row[5] < base[5]]
    with canvas(file, 10.5, 3.6) as figure:
        left, middle, right = figure.subplots(1, 3)
        for number, lr in enumerate(RATES):
            look = {"color": COLORS[number], "marker": MARKERS[number], "linestyle": "", "label": f"lr {lr:g}"}
            for axes, shown, x, y in ((left, rows, 4, 3), (right, learned, 5, 6)):
                mine = [row for row in shown if row[0] == f"{lr:g}"]
                axes.plot([row[x] for row in mine], [row[y] for row in mine], **look)
                for row in mine:
                    axes.annotate(row[1], (row[x], row[y]), xytext=(4, 3), textcoords="offset points", fontsize=7)
        left.set_xscale("log")
        left.set_xlabel("mean ‖Δ‖/‖W‖; the numbers are ranks")
        left.set_ylabel("matrices with an intruder dimension")
        kinds = figures["kinds"]
        image = middle.imshow(
            [[kinds[f"{RATES[-1]:g}|{rank}"][kind] for rank in RANKS] for kind in ALL],
            cmap="cividis",
            aspect="auto",
            vmin=0,
        )
        middle.set_xticks(range(len(RANKS)), [str(rank) for rank in RANKS])
        middle.set_yticks(range(len(ALL)), ALL)
        middle.set_xlabel(f"rank, lr {RATES[-1]:g}")
        figure.colorbar(image, ax=middle, label="intruder dimensions a matrix")
        right.axhline(base[6], color="black", linewidth=0.8, linestyle=":")
        right.annotate("no adapter", (base[5], base[6]), xytext=(-30, -9), textcoords="offset points", fontsize=7)
        right.set_xscale("log")
        for formatter in (right.xaxis.set_major_formatter, right.xaxis.set_minor_formatter):
            formatter("{x:g}")
        right.tick_params(which="both", labelsize=7)
        right.set_xlabel("held-out loss on the task, nats a token")
        right.set_ylabel("loss on general text, nats a token")
        for axes in (left, right):
            _grid(axes, "y")
        _shared_legend(figure, right)


PICTURES: dict[str, Callable[[Figures, Path], None]] = {
    "budget": budget, "similarity": similarity, "layers": layers, "amplification": amplification,
    "intruders": intruders,
}  # fmt: skip


def _curves(axes: Any, curves: dict[str, list[float]], title: str) -> None:
    for number, (name, values) in enumerate(curves.items()):
        look = (
            {"color": "black", "linestyle": ":"}
            if name == RANDOM
            else {"color": COLORS[number], "linestyle": LINES[number]}
        )
        axes.plot(values, label=name, linewidth=1.4, **look)
    axes.set_xlabel("layer")
    axes.set_title(title, loc="left", fontweight="bold")
    _grid(axes, "y")


def _shared_legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)


def _grid(axes: Any, axis: str) -> None:
    axes.grid(axis=axis, color="#dddddd", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
