"""`lorakit inspect`: an adapter's findings and figures on the terminal, and optionally as a page, a picture or JSON."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..errors import ConfigError
from ..quantization import QUANT_TYPES
from .console import console, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..inspection import AdapterInfo, LayerInfo
    from ..inspection.probes import ProbeLog
    from ..inspection.quantization.quantization_view import QuantizationView

_SHADES = " ░▒▓█"


def inspect(
    adapter: Annotated[Path, typer.Argument(help="folder of an adapter or a run", show_default=False)],
    *,
    base: Annotated[str | None, typer.Option(help="folder or known name of the base model")] = None,
    vs: Annotated[Path | None, typer.Option(help="another adapter or run to compare with")] = None,
    html: Annotated[Path | None, typer.Option(help="file for one offline page")] = None,
    png: Annotated[Path | None, typer.Option(help="file for a picture of the heat map and the spectra")] = None,
    svg: Annotated[Path | None, typer.Option(help="file for the same picture as vectors")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for every figure")] = None,
    quant_type: Annotated[
        str | None,
        typer.Option(help=f"{' or '.join(QUANT_TYPES)}: also compare its error on the 16-bit base with the update"),
    ] = None,
) -> None:
    """Look inside an adapter: what it changed, how much of its rank it uses, what stands out."""
    from ..files import write_text
    from ..inspection import inspect_adapter

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("")
        info = inspect_adapter(
            adapter, base=base, vs=vs, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    quantization = _quantization(adapter, base, quant_type) if quant_type else None
    print_info(console, info, [*info.findings, *(quantization.findings() if quantization else [])])
    if json_file:
        write_text(json_file, json.dumps(info.as_json(), indent=1, allow_nan=False) + "\n")
    written = [file for file in (html, png, svg, json_file) if file]
    if html:
        from ..inspection.html.page import write_page

        write_page(info, html, _history(adapter), quantization)
    for file in (png, svg):
        if file:
            from ..inspection.html.plot import plot

            plot(info, file)
    for file in written:
        say(f"{file}: written")


def _quantization(adapter: Path, base: str | None, quant_type: str) -> QuantizationView:
    from ..adapters import find_adapter_folder, load_adapter
    from ..inspection.quantization.quantization_view import quantization_view
    from ..models import load_model, resolve_model

    if base is None:
        raise ConfigError("--quant-type compares with the weights before quantization: name them with --base")
    model = load_model(resolve_model(base), quant_type=quant_type)
    load_adapter(model, find_adapter_folder(adapter))
    return quantization_view(model)


def _history(adapter: Path) -> ProbeLog | None:
    """Return the probe log of a run's folder, or of the folder around an adapter, if there is one."""
    from ..inspection.probes.log import FILE, read_probes

    run = next((folder for folder in (adapter, adapter.parent) if (folder / FILE).is_file()), None)
    return read_probes(run) if run else None


def print_info(console: Console, info: AdapterInfo, findings: Sequence[str]) -> None:
    """Print the findings, a line of figures for each kind of module, and a map of the update's norms."""
    console.print(f"[bold]{escape(info.source)}[/bold]", soft_wrap=True)
    on = f", on {info.base}" if info.base else ""
    console.print(
        f"{len(info.layers)} layers, {info.parameters:,} parameters, norm {info.norm:.4g}{on}\n", markup=False
    )
    bullets = Table.grid(padding=(0, 1, 0, 0))
    for finding in findings:
        bullets.add_row("•", Text(finding))
    console.print(bullets)
    console.print()
    console.print(_modules(info))
    if any(layer.index is not None for layer in info.layers):
        console.print()
        console.print(_map(info))


def _modules(info: AdapterInfo) -> Table:
    """Return a table of means by kind of module."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    has_base = any(layer.base for layer in info.layers)
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
    for module, group in _grouped(info).items():
        ranks = sorted({layer.rank for layer in group})
        cells = [escape(module), str(len(group)), f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"]
        cells += [f"{fmean(layer.effective_rank for layer in group):.1f}"]
        cells += [
            f"{fmean(layer.stable_rank for layer in group):.1f}",
            f"{fmean(layer.rank_for(0.99) for layer in group):.1f}",
        ]
        cells += [f"{fmean(layer.norm for layer in group):.3g}", f"{sum(map(info.share, group)):.1%}"]
        based = [layer.base for layer in group if layer.base]
        if based:
            cells += [f"{fmean(one.relative_norm for one in based):.2%}", str(sum(len(one.intruders) for one in based))]
        table.add_row(*cells)
    return table


def _map(info: AdapterInfo) -> Table:
    """Return a table of norms as shades: blocks from left to right, one row for each kind of module."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    largest = max(layer.norm for layer in info.layers) or 1.0
    for stack in dict.fromkeys(layer.stack for layer in info.layers if layer.index is not None):
        inside = [layer for layer in info.layers if layer.stack == stack and layer.index is not None]
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


def _grouped(info: AdapterInfo) -> dict[str, list[LayerInfo]]:
    groups: dict[str, list[LayerInfo]] = {}
    for layer in info.layers:
        groups.setdefault(layer.module, []).append(layer)
    return groups
