"""Reading the files of a run: metrics.json, train.jsonl, predictions.jsonl, recipe.yaml."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError


@dataclass(frozen=True)
class Run:
    """The content of a run folder, checked for its structure."""

    folder: Path
    metrics: dict[str, Any]
    steps: list[dict[str, Any]]
    predictions: list[dict[str, Any]]
    recipe: str


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        DataError: as `write_report`.
    """
    path = folder / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing; a report needs a run that was evaluated") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(metrics, dict):
        raise DataError(f"{path} holds a {type(metrics).__name__}, expected a JSON object")
    recipe = folder / "recipe.yaml"
    return Run(
        folder,
        metrics,
        read_json_lines(folder / "train.jsonl"),
        read_json_lines(folder / "predictions.jsonl"),
        recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
    )


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file; [] if there is none.

    Raises:
        DataError: a line is not a JSON object; a last line that was cut off does not count.
    """
    if not path.is_file():
        return []
    whole_lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # the rest was cut off by a crash
    records = []
    for number, line in enumerate(whole_lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not a JSON line: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: holds a {type(record).__name__}, expected a JSON object")
        records.append(record)
    return records
