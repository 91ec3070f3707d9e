"""The page: one HTML file that needs nothing else, with an adapter's figures inside as JSON, which its script draws.

The figures are those of the API, cut to `DIGITS` significant digits; by columns, so that an adapter of hundreds of
layers stays small.
"""

from __future__ import annotations

import json
import os
from importlib.resources import files
from typing import Any

from markupsafe import Markup, escape

from ..files import write_text
from .against_base import INTRUDER_COSINE
from .info import AdapterInfo

DIGITS = 7
MOST_VALUES = 128  # singular values of a layer on the page; of higher ranks the smallest are left out
_MEASURES = {  # column -> what the page calls it; only those with a number in some layer are offered
    "norm": "norm of the update",
    "share": "share of the whole update",
    "effective_rank": "effective rank",
    "stable_rank": "stable rank",
    "numerical_rank": "numerical rank",
    "noise_rank": "rank above noise",
    "rank_for_99": "rank for 99% of the update",
    "spectral_norm": "largest singular value",
    "nuclear_norm": "nuclear norm",
    "sparsity": "share of zeros",
    "dead_directions": "dead directions",
    "norm_a": "norm of A",
    "norm_b": "norm of B",
    "relative_norm": "norm, relative to the base weight",
    "amplification": "amplification factor",
    "alignment_in": "share along the base's leading input directions",
    "alignment_out": "share along the base's leading output directions",
    "intruders": "intruder dimensions",
    "magnitude_change": "change of magnitudes",
    "direction_change": "change of directions",
}
_COMPARED = {
    "vs_cosine": "cosine of the two updates",
    "vs_difference": "norm of the difference",
    "vs_relative_difference": "difference, relative to the other",
    "vs_similarity": "overlap of leading input subspaces",
    "vs_shared": "shared directions",
}


def write_page(info: AdapterInfo, path: str | os.PathLike[str]) -> None:
    """Write the page, whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    write_text(path, page(info))


def page(info: AdapterInfo) -> str:
    """Return the page's HTML."""
    folder = files("lorakit.inspection")
    data = json.dumps(page_data(info), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "TITLE": escape(info.source),
        "STYLE": Markup((folder / "page.css").read_text(encoding="utf-8")),
        "SCRIPT": Markup((folder / "page.js").read_text(encoding="utf-8")),
        "DATA": Markup(data),
    }
    html = (folder / "page.html").read_text(encoding="utf-8")
    for name in ("TITLE", "STYLE", "SCRIPT", "DATA"):  # the data last: nothing in it is taken for a name
        html = html.replace(f"@@{name}@@", str(parts[name]))
    return html


def page_data(info: AdapterInfo) -> dict[str, Any]:
    """Return what the page shows, as JSON values: `adapters`, one or two, each with `columns` and `spectra`."""
    adapters = [_adapter(info)] + ([_adapter(info.other)] if info.other else [])
    columns = adapters[0]["columns"]
    offered = {
        name: words
        for name, words in (_MEASURES | _COMPARED).items()
        if any(isinstance(value, int | float) for value in columns.get(name, ()))
    }
    cosines = {layer.name: _rounded(layer.cosines_in) for layer in info.comparison.layers} if info.comparison else {}
    return {
        "base": info.base,
        "findings": list(info.findings),
        "measures": offered,
        "compared": [name for name in _COMPARED if name in offered],
        "adapters": adapters,
        "cosines": cosines,
        "intruderCosine": INTRUDER_COSINE,
    }


def _adapter(info: AdapterInfo) -> dict[str, Any]:
    table = info.table()
    return {
        "source": info.source,
        "norm": _rounded(info.norm),
        "parameters": info.parameters,
        "columns": {column: _rounded([row[column] for row in table]) for column in table[0]},
        "spectra": [_rounded(layer.singular_values[:MOST_VALUES]) for layer in info.layers],
        "tunedCosines": [_rounded(layer.base.tuned_cosines) if layer.base else None for layer in info.layers],
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
