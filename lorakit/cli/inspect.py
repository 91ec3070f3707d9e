"""`lorakit inspect`: an adapter's findings and figures on the terminal, and optionally as a page, a picture or JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from ..errors import ConfigError
from ..quantization import QUANT_TYPES
from .console import console, say

if TYPE_CHECKING:
    from ..inspection.probes import ProbeLog
    from ..inspection.quantization.quantization_view import QuantizationView


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
    info.print_to(console, quantization.findings() if quantization else ())
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
