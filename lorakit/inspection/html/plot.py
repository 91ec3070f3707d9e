"""A picture for papers, drawn by matplotlib: one measure over blocks and modules, and the updates' spectra."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ...errors import ConfigError, LorakitError, did_you_mean
from ...files import atomic_write
from ..measure.info import AdapterInfo

_KINDS = (".png", ".svg", ".pdf")
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#000000")  # Okabe and Ito's
_LINES = ("-", "--", ":", "-.")


def plot(info: AdapterInfo, path: str | os.PathLike[str], measure: str = "norm") -> None:
    """Write a PNG, SVG or PDF, by the path's ending.

    Args:
        measure: a column of `info.table()`.

    Raises:
        ConfigError: the ending is unknown, or the measure is not a column of numbers.
        LorakitError: matplotlib is not installed.
        StorageError: it cannot be written.
    """
    target = Path(path)
    if target.suffix.lower() not in _KINDS:
        raise ConfigError(f"{target}: expected a name that ends in {', '.join(_KINDS)}")
    table = info.table()
    if not any(isinstance(row.get(measure), int | float) for row in table):
        raise ConfigError(f"there is no figure '{measure}'{did_you_mean(measure, table[0])}")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise LorakitError("matplotlib is not installed; install it with: pip install matplotlib") from None
    with rc_context({"font.size": 8, "svg.hashsalt": "lorakit"}):  # the same SVG from the same figures
        figure = Figure(figsize=(7.0, 4.6), layout="constrained")
        above, below = figure.subplots(2, 1, height_ratios=(1, 1.2))
        _draw_map(figure, above, table, measure)
        _draw_spectra(below, info)
        with atomic_write(target) as part:
            kind = target.suffix.lower().removeprefix(".")
            figure.savefig(part, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else {})


def _draw_map(figure: Any, axes: Any, table: list[dict[str, Any]], measure: str) -> None:
    blocks = list(dict.fromkeys((row["stack"], row["index"]) for row in table))
    modules = list(dict.fromkeys(row["module"] for row in table))
    cells = [[float("nan")] * len(blocks) for _ in modules]
    for row in table:
        if row[measure] is not None:
            cells[modules.index(row["module"])][blocks.index((row["stack"], row["index"]))] = float(row[measure])
    image = axes.imshow(cells, cmap="cividis", aspect="auto", interpolation="nearest", vmin=min(0, *map(min, cells)))
    axes.set_yticks(range(len(modules)), modules)
    every = -(-len(blocks) // 20)
    axes.set_xticks(range(0, len(blocks), every), ["" if index is None else str(index) for _, index in blocks[::every]])
    axes.set_xlabel("block")
    figure.colorbar(image, ax=axes, label=measure.replace("_", " "))


def _draw_spectra(axes: Any, info: AdapterInfo) -> None:
    """Draw each kind of module's median spectrum, and the range of its layers as a band."""
    modules = list(dict.fromkeys(layer.module for layer in info.layers))
    for number, module in enumerate(modules):
        spectra = [layer.singular_values for layer in info.layers if layer.module == module and not layer.dead]
        if not spectra:
            continue
        columns = [sorted(values) for values in zip(*spectra, strict=False)]
        numbers = range(1, len(columns) + 1)
        style = {"color": _COLORS[number % len(_COLORS)], "linestyle": _LINES[number // len(_COLORS) % len(_LINES)]}
        axes.plot(numbers, [values[len(values) // 2] for values in columns], linewidth=1.4, label=module, **style)
        axes.fill_between(
            numbers,
            [values[0] for values in columns],
            [values[-1] for values in columns],
            color=style["color"],
            alpha=0.08,
        )
    axes.set_xlabel("singular value: median and range over the layers of each kind")
    axes.set_yscale("log")
    axes.legend(ncols=min(4, len(modules)), fontsize=7, frameon=False)
