"""Tables of an adapter's layers: a line of figures for each kind of module, and a map of the update's norms."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .layer_info import LayerInfo

_SHADES = " ░▒▓█"


def modules_table(layers: Sequence[LayerInfo]) -> Table:
    """Return a table of means by kind of module."""
    energy = sum(layer.norm**2 for layer in layers) or 1.0
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    has_base = any(layer.base for layer in layers)
    headings = [
        "module",
        "layers",
        "rank",
        "effective\nrank",
        "stable\nrank",
        "rank for\n99%",
        "norm",
        "of the\nupdate",
    ]
    headings += ["of the\nbase", "intruders"] if has_base else []
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "module" else "right", vertical="bottom")
    for module, group in _grouped(layers).items():
        ranks = sorted({layer.rank for layer in group})
        cells = [escape(module), str(len(group)), f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"]
        cells += [f"{fmean(layer.effective_rank for layer in group):.1f}"]
        cells += [
            f"{fmean(layer.stable_rank for layer in group):.1f}",
            f"{fmean(layer.rank_for(0.99) for layer in group):.1f}",
        ]
        cells += [
            f"{fmean(layer.norm for layer in group):.3g}",
            f"{sum(layer.norm**2 for layer in group) / energy:.1%}",
        ]
        based = [layer.base for layer in group if layer.base]
        if based:
            cells += [f"{fmean(one.relative_norm for one in based):.2%}", str(sum(len(one.intruders) for one in based))]
        table.add_row(*cells)
    return table


def norms_map(layers: Sequence[LayerInfo]) -> Table:
    """Return a table of norms as shades: blocks from left to right, one row for each kind of module."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    largest = max(layer.norm for layer in layers) or 1.0
    for stack in dict.fromkeys(layer.stack for layer in layers if layer.index is not None):
        inside = [layer for layer in layers if layer.stack == stack and layer.index is not None]
        numbers = sorted({layer.index or 0 for layer in inside})
        for module in dict.fromkeys(layer.module for layer in inside):
            norms = {layer.index: layer.norm for layer in inside if layer.module == module}
            shades = "".join(_shade(norms.get(number), largest) for number in numbers)
            table.add_row(escape(module), Text(shades))
        table.add_row(
            "", f"[dim]{escape(stack)} {numbers[0]} to {numbers[-1]}; shade: norm, the darkest is {largest:.3g}[/dim]"
        )
    return table


def _shade(norm: float | None, largest: float) -> str:
    if norm is None:
        return " "
    return _SHADES[0] if norm == 0 else _SHADES[1 + min(3, int(4 * norm / largest))]


def _grouped(layers: Sequence[LayerInfo]) -> dict[str, list[LayerInfo]]:
    groups: dict[str, list[LayerInfo]] = {}
    for layer in layers:
        groups.setdefault(layer.module, []).append(layer)
    return groups
