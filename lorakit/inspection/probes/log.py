"""probes.jsonl: the probes' figures, written step by step and read back as tables.

The first line is the header; every other line is a step. Figures of layers are lists in the order of the header's
layers.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from ...errors import DataError, StorageError
from ...files import atomic_write, write_text
from ...printed import Printed
from .token_losses import bin_name

FILE = "probes.jsonl"
FORMAT = 1
LAYER_FIGURES = (
    "norm_A", "norm_B", "grad_A", "grad_B", "update_A", "update_B", "delta_norm", "effective_rank", "drift", "cka",
)  # fmt: skip


@dataclass(frozen=True)
class Header:
    """The facts that hold for a whole run.

    Attributes:
        layers: names of the adapted layers.
        ranks: the rank allotted to each.
        base_norms: ‖W‖ of each base weight.
        settings: the probes'.
    """

    layers: list[str]
    ranks: list[int]
    base_norms: list[float]
    settings: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT


@dataclass(frozen=True, repr=False)
class ProbeLog(Printed):
    """The figures of one run's probes.

    Attributes:
        header: layers, ranks, norms of the base.
        rows: one per step that was measured: "step", the figures of layers that were due (`LAYER_FIGURES`), "noise"
            and "noise_scale" if due, "position_loss", "position_tokens", "examples", and "alarms" if there are any.
    """

    header: Header
    rows: list[dict[str, Any]]

    def __str__(self) -> str:
        span = f", {self.rows[0]['step']} to {self.rows[-1]['step']}" if self.rows else ""
        alarms = [f"step {alarm['step']}: {alarm['what']} ({len(alarm['layers'])} layers)" for alarm in self.alarms]
        total = f"{len(self.rows)} measured steps{span}, of {len(self.header.layers)} layers"
        return "\n".join([f"{total}; {len(alarms)} alarms", *alarms[:10]])

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """All alarms: step, what, layers."""
        return [{"step": row["step"], **alarm} for row in self.rows for alarm in row.get("alarms", [])]

    def table(self) -> list[dict[str, Any]]:
        """Return the figures of layers, tidy: one row per step and layer; a figure that was not due is None.

        Derived figures are added: update_ratio_A and update_ratio_B, ‖step's update‖ / ‖matrix after it‖;
        delta_share, ‖scaling B A‖ / ‖W‖; saturation, effective rank / rank allotted.
        """
        table = []
        for row in self.rows:
            for index, layer in enumerate(self.header.layers):
                values = {name: row[name][index] if name in row else None for name in LAYER_FIGURES}
                table.append({"step": row["step"], "layer": layer, **values} | self._derived(values, index))
        return table

    def steps(self) -> list[dict[str, Any]]:
        """Return the figures of whole steps, tidy: step, signal, trace, noise_scale; None if there is no estimate."""
        return [
            {
                "step": row["step"], "signal": (row.get("noise") or {}).get("signal"),
                "trace": (row.get("noise") or {}).get("trace"), "noise_scale": row.get("noise_scale"),
            }
            for row in self.rows
        ]  # fmt: skip

    def position_loss(self, last: int | None = None) -> list[dict[str, Any]]:
        """Return the mean loss by position among a conversation's trained tokens, over the last `last` rows or all."""
        sums: dict[int, float] = {}
        counts: dict[int, int] = {}
        for row in self.rows[-last:] if last else self.rows:
            for index, (total, count) in enumerate(zip(row["position_loss"], row["position_tokens"], strict=True)):
                sums[index] = sums.get(index, 0.0) + total
                counts[index] = counts.get(index, 0) + count
        return [
            {"positions": bin_name(index), "loss": sums[index] / counts[index], "trained_tokens": counts[index]}
            for index in sums
            if counts[index]
        ]

    def hardest(self, count: int = 10) -> list[dict[str, Any]]:
        """Return the conversations with the highest mean loss when last seen: source, loss, trained tokens, step."""
        seen = {
            source: {"source": source, "loss": loss, "trained_tokens": tokens, "step": row["step"]}
            for row in self.rows
            for source, loss, tokens in row["examples"]
        }
        return sorted(seen.values(), key=lambda one: -float(one["loss"]))[:count]

    def write_parquet(self, path: str | PathLike[str]) -> None:
        """Write `table()` as Parquet, one row per step and layer.

        Raises:
            StorageError: pyarrow is not installed, or the file cannot be written.
        """
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise StorageError("Parquet needs pyarrow: pip install pyarrow") from None
        with atomic_write(path) as part:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(self.table()), part)

    def _derived(self, values: Mapping[str, Any], index: int) -> dict[str, float | None]:
        def share(part: str, whole: float | None) -> float | None:
            return values[part] / whole if values[part] is not None and whole else None

        return {
            "update_ratio_A": share("update_A", values["norm_A"]),
            "update_ratio_B": share("update_B", values["norm_B"]),
            "delta_share": share("delta_norm", self.header.base_norms[index]),
            "saturation": share("effective_rank", self.header.ranks[index]),
        }


def read_probes(path: str | PathLike[str]) -> ProbeLog:
    """Read the log of a run's probes; a line that a crash cut off is left out.

    Args:
        path: the run's folder, or its probes.jsonl.

    Raises:
        DataError: there is none, or it is malformed (the message has the line).
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last line end was cut off
    except OSError as error:
        hint = "; train with probes to have one" if isinstance(error, FileNotFoundError) else ""
        raise DataError(f"{file} cannot be read: {error.strerror or error}{hint}") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            assert isinstance(row, dict)
        except (ValueError, AssertionError):
            raise DataError(f"{file}:{number}: expected a JSON object") from None
        rows.append(row)
    if not rows or rows[0].get("format") != FORMAT:
        raise DataError(f"{file}:1: expected the header of format {FORMAT}")
    try:
        return ProbeLog(Header(**rows[0]), rows[1:])
    except TypeError:
        raise DataError(f"{file}:1: the header does not have the fields of format {FORMAT}") from None


class ProbeFile:
    """Writes probes.jsonl and flushes it line by line; on resume, cuts it back to the steps that the run still counts.

    Args:
        path: of the file, or None to keep the rows in memory.
        header: its first line.
        done: steps taken before a resume; rows of later steps are dropped.

    Attributes:
        kept: the rows that were there already.

    Raises:
        StorageError: the file cannot be written.
    """

    def __init__(self, path: Path | None, header: Header, done: int) -> None:
        self.path, self.header = path, Header(**rounded(asdict(header)))
        self.kept: list[dict[str, Any]] = []
        self._rows: list[dict[str, Any]] = []
        self._file = None
        if path is None:
            return
        if done and path.is_file():
            with contextlib.suppress(DataError):  # a file of another kind is replaced
                self.kept = [row for row in read_probes(path).rows if row["step"] <= done]
        write_text(path, "".join(_line(row) for row in (asdict(self.header), *self.kept)))
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Add the row of one step.

        Raises:
            StorageError: the disk is full, or the folder is gone.
        """
        if self._file is None:
            self._rows.append(rounded(row))
            return
        try:
            self._file.write(_line(row))
            self._file.flush()
        except OSError as error:
            raise StorageError(f"cannot write {self._file.name}: {error.strerror or error}") from error

    def close(self) -> None:
        """Close the file; every line was flushed."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def log(self) -> ProbeLog:
        """Return everything written so far."""
        return ProbeLog(self.header, self._rows) if self.path is None else read_probes(self.path)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(rounded(row)) + "\n"


def rounded(value: Any) -> Any:
    """Round floats to nine digits, enough for any fp32 value; NaN and inf, which JSON lacks, become None."""
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
