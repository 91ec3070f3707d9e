"""`lorakit combine` and `lorakit resize`: new adapter folders out of others, without their model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .console import say

if TYPE_CHECKING:
    from ..adapters import UpdateReport

Target = Annotated[Path, typer.Argument(help="adapter folder to write", show_default=False)]


def combine(
    target: Target,
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER[=WEIGHT]...", help="folders; a weight is 1 if not given")
    ],
    method: Annotated[
        str, typer.Option(help="linear, cat, svd, ties, dare_linear, dare_ties or magnitude_prune")
    ] = "linear",
    rank: Annotated[int | None, typer.Option(help="of the result")] = None,
    density: Annotated[
        float | None, typer.Option(help="share of the entries that stay, for ties, dare and prune")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the entries that dare drops")] = 0,
) -> None:
    """Combine adapters into one: their weighted sum, exact, or another rule."""
    from ..adapters import combine_folders

    weights = dict(_weight(adapter) for adapter in adapters)
    if len(weights) < len(adapters):
        raise ConfigError("an adapter is named twice; give it once, with the sum of the weights")
    how: dict[str, Any] = {"method": method, "rank": rank, "density": density, "seed": seed}
    _report(combine_folders(weights, target, **how), target)


def resize(
    source: Annotated[Path, typer.Argument(help="adapter folder", show_default=False)],
    target: Target,
    rank: Annotated[int | None, typer.Option(help="the most that a layer gets")] = None,
    energy: Annotated[float | None, typer.Option(help="share of its squared norm that each layer keeps")] = None,
    parameters: Annotated[int | None, typer.Option(help="that all layers together may take")] = None,
) -> None:
    """Give an adapter other ranks, and say what that loses."""
    from ..adapters import resize_folder

    _report(resize_folder(source, target, rank=rank, energy=energy, parameters=parameters), target)


def _weight(text: str) -> tuple[str, float]:
    folder, equals, number = text.rpartition("=")
    if not equals or Path(text).exists():  # a folder's own name may have the sign in it
        return text, 1.0
    try:
        return folder, float(number)
    except ValueError:
        raise ConfigError(f"'{text}': expected ADAPTER=WEIGHT with a number, such as runs/a/adapter=0.5") from None


def _report(report: UpdateReport, target: Path) -> None:
    say(f"{report}\n{target}: written")
