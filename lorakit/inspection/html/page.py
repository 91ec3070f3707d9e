"""The page: one self-contained HTML file. It holds an adapter's figures as JSON, and its script draws them.

The figures are the API's, rounded to `DIGITS` significant digits. They are stored by column, so that the page of an
adapter with hundreds of layers stays small.
"""

from __future__ import annotations

import json
import os
import re
from importlib.resources import files
from math import isfinite
from typing import Any

from markupsafe import escape

from ...files import write_text
from ..measure.info import AdapterInfo
from ..measure.intruders import COSINE
from ..probes import ProbeLog
from ..quantization.quantization_view import LayerQuantization, QuantizationView

DIGITS = 7
MOST_VALUES = 128  # most singular values of a layer on the page; of higher ranks the smallest are left out
_MEASURES = {  # column -> its name on the page, which offers the columns with a number in some layer
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
    "vs_learned_similarity": "overlap of leading directions on the side that began at zero",
}
_QUANTIZATION = {
    "quant_snr_db": "signal to noise of 4 bits, dB",
    "quant_repaired": "share of the quantization error repaired",
    "quant_alignment": "alignment with the best repair",
    "quant_outliers": "outlier weights",
    "quant_code_entropy": "bits of information in a code",
}
_HISTORY = {"delta_norm": "Norm of the update", "effective_rank": "Effective rank", "drift": "Drift of the output"}
_HISTORY_NUMBERS = 60_000  # most figures of history on a page; a longer history is thinned out evenly


def write_page(
    info: AdapterInfo,
    path: str | os.PathLike[str],
    history: ProbeLog | None = None,
    quantization: QuantizationView | None = None,
) -> None:
    """Write the page, whole or not at all.

    Args:
        history: the probes' log of the training run.
        quantization: the base's quantization error, beside the adapter.

    Raises:
        StorageError: it cannot be written.
    """
    write_text(path, page(info, history, quantization))


def page(info: AdapterInfo, history: ProbeLog | None = None, quantization: QuantizationView | None = None) -> str:
    """Return the page's HTML; arguments as in `write_page`."""
    folder = files("lorakit.inspection.html")
    data = json.dumps(page_data(info, history, quantization), allow_nan=False, separators=(",", ":"))
    fields = {
        "TITLE": str(escape(info.source)),
        "STYLE": (folder / "page.css").read_text(encoding="utf-8"),
        "SCRIPT": (folder / "page.js").read_text(encoding="utf-8"),
        "DATA": data.replace("<", "\\u003c"),  # so that no "</script>" in a name ends the script
    }
    html = (folder / "page.html").read_text(encoding="utf-8")
    return re.sub("@@([A-Z]+)@@", lambda match: fields[match[1]], html)


def page_data(
    info: AdapterInfo, history: ProbeLog | None = None, quantization: QuantizationView | None = None
) -> dict[str, Any]:
    """Return the page's contents as JSON values; `adapters`, one or two, have `columns` and `spectra` each."""
    adapters = [_adapter(info)] + ([_adapter(info.other)] if info.other else [])
    if quantization:
        adapters[0]["columns"] |= _quantization_columns(info, quantization)
    columns = adapters[0]["columns"]
    offered = {
        name: words
        for name, words in (_MEASURES | _COMPARED | _QUANTIZATION).items()
        if any(isinstance(value, int | float) for value in columns.get(name, ()))
    }
    cosines = {layer.name: _rounded(layer.cosines_in) for layer in info.comparison.layers} if info.comparison else {}
    return {
        "base": info.base,
        "findings": [*info.findings, *(quantization.findings() if quantization else [])],
        "measures": offered,
        "compared": [name for name in _COMPARED if name in offered],
        "adapters": adapters,
        "cosines": cosines,
        "intruderCosine": COSINE,
        "history": _history(history) if history else {},
        "quantization": {layer.name: _quantized(layer) for layer in quantization.layers} if quantization else {},
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


def _quantization_columns(info: AdapterInfo, quantization: QuantizationView) -> dict[str, list[Any]]:
    rows = {row["name"]: row for row in quantization.table()}
    return {
        column: _rounded([rows.get(layer.name, {}).get(column.removeprefix("quant_")) for layer in info.layers])
        for column in _QUANTIZATION
    }


def _quantized(layer: LayerQuantization) -> dict[str, Any]:
    return {
        "spectrum": _rounded(layer.singular_values[:32]),
        "values": _rounded([use.value for use in layer.codes]),
        "shares": _rounded([use.share for use in layer.codes]),
        "expected": _rounded([use.expected for use in layer.codes]),
    }


def _history(log: ProbeLog) -> dict[str, Any]:
    """Return figures of layers over time: title -> {steps, values by layer}, for the steps that have the figure."""
    charts = {}
    for figure, title in _HISTORY.items():
        rows = [row for row in log.rows if figure in row]
        every = -(-len(rows) * len(log.header.layers) * len(_HISTORY) // _HISTORY_NUMBERS) or 1
        rows = [row for number, row in enumerate(rows) if number % every == 0 or number == len(rows) - 1]
        if rows:
            values = zip(*(row[figure] for row in rows), strict=True)
            layers = dict(zip(log.header.layers, map(_rounded, map(list, values)), strict=True))
            charts[title] = {"steps": [row["step"] for row in rows], "layers": layers}
    return charts


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if isfinite(value) else None
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
