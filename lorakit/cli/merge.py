"""`lorakit merge`: write a copy of a model with an adapter merged into its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..quantization import QUANT_TYPES
from .console import console, say


def merge(
    adapter: Annotated[Path, typer.Argument(help="folder of an adapter or a run", show_default=False)],
    *,
    out: Annotated[Path, typer.Option(help="folder to write", show_default=False)],
    base: Annotated[
        str | None,
        typer.Option(help="folder or known name of the 16-bit model; default: the base that the adapter names"),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help=f"write {' or '.join(QUANT_TYPES)} instead of the base's own dtype"),
    ] = None,
    block_size: Annotated[int, typer.Option(help="with --quantize: elements that share a scale")] = 64,
    double_quant: Annotated[bool, typer.Option(help="with --quantize: store the scales in 8 bits")] = True,
    shard_size: Annotated[str, typer.Option(help="maximum size of one file, e.g. 5GB, 500MB")] = "5GB",
    layers: Annotated[bool, typer.Option("--layers", help="show every layer, not only the worst")] = False,
) -> None:
    """Write a copy of a model with an adapter merged into its weights, for lorakit, transformers and others."""
    from ..adapters import merge_checkpoint
    from ..quantization.policy import QuantConfig
    from ..sizes import parse_size
    from .progress import byte_progress

    config = None
    if quantize is not None:
        config = QuantConfig(quant_type=quantize, block_size=block_size, double_quant=double_quant)
    with byte_progress(console) as progress:
        report = merge_checkpoint(adapter, out, base, config, parse_size(shard_size), progress)
    say(str(report))
    if layers:
        say(report.table())
    say(f"{out}: written")
