"""`lorakit combine` and `lorakit resize`: make new adapter folders from others, without loading a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .console import Overwrite, check_target, say

if TYPE_CHECKING:
    from ..adapters import UpdateReport

Target = Annotated[Path, typer.Argument(help="adapter folder to write", show_default=False)]


def combine(
    target: Target,
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER[=WEIGHT]...", help="folders; a weight is 1 if not given")
    ],
    *,
    method: Annotated[
        str, typer.Option(help="linear, cat, svd, ties, dare_linear, dare_ties or magnitude_prune")
    ] = "linear",
    rank: Annotated[int | None, typer.Option(help="rank of the result")] = None,
    density: Annotated[
        float | None, typer.Option(help="share of the entries to keep, for ties, dare and magnitude_prune")
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of dare's random drops")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Combine adapters into one: their exact weighted sum, or another rule."""
    from ..adapters import combine_folders

    check_target(target, overwrite)
    weights = dict(_weight(adapter) for adapter in adapters)
    if len(weights) < len(adapters):
        raise ConfigError("an adapter is named twice; give it once, with the sum of the weights")
    how: dict[str, Any] = {"method": method, "rank": rank, "density": density, "seed": seed}
    _report(combine_folders(weights, target, **how), target)


def resize(
    source: Annotated[Path, typer.Argument(help="adapter folder", show_default=False)],
    target: Target,
    rank: Annotated[int | None, typer.Option(help="maximum rank of a layer")] = None,
    energy: Annotated[float | None, typer.Option(help="share of its squared norm that each layer keeps")] = None,
    parameters: Annotated[int | None, typer.Option(help="maximum parameters of all layers together")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Change an adapter's ranks, and report what that loses."""
    from ..adapters import resize_folder

    check_target(target, overwrite)
    _report(resize_folder(source, target, rank=rank, energy=energy, parameters=parameters), target)


def _weight(text: str) -> tuple[str, float]:
    folder, equals, number = text.rpartition("=")
    if not equals or Path(text).exists():  # a folder's name may contain "="
        return text, 1.0
    try:
        return folder, float(number)
    except ValueError:
        raise ConfigError(f"'{text}': expected ADAPTER=WEIGHT with a number, such as runs/a/adapter=0.5") from None


def _report(report: UpdateReport, target: Path) -> None:
    say(f"{report}\n{target}: written")
