"""Runs the sides of a comparison in turn, each in its own process: peak memory is separate, and noise affects all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
# Settings of TrainConfig that recompute activations instead of keeping them.
CHECKPOINTING: tuple[str, ...] = ("checkpointing=layer",)

Figures = Mapping[str, Any]  # a script's output


@dataclass(frozen=True)
class Side:
    """A script that prints its figures as its last line, in JSON.

    Attributes:
        name: name in tables.
        module: module of the script.
        arguments: its command line.
    """

    name: str
    module: str
    arguments: tuple[str, ...]

    def measure(self) -> Figures:
        """Run the script in its own process; return its figures."""
        print(f"  {self.name} ...", end="", flush=True, file=sys.stderr)
        run = subprocess.run(
            [sys.executable, "-m", self.module, *self.arguments],
            capture_output=True, text=True, cwd=ROOT, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        if run.returncode:
            sys.exit(f"\n{self.module} {' '.join(self.arguments)} failed:\n{run.stderr[-4000:]}")
        figures: Figures = json.loads(run.stdout.splitlines()[-1])
        seconds = f"{median(figures['seconds']):.2f} s, " if figures.get("seconds") else ""
        print(f" {seconds}{figures['peak_mb']:.0f} MiB" if "peak_mb" in figures else "", file=sys.stderr)
        return figures


def alternate(sides: Sequence[Side], rounds: int) -> dict[Side, list[Figures]]:
    """Measure all sides in turn, `rounds` times."""
    seen: dict[Side, list[Figures]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            seen[side].append(side.measure())
    return seen


def step_seconds(runs: Sequence[Figures]) -> float:
    """Return the median of all timed steps of a side's runs."""
    return float(median(seconds for run in runs for seconds in run["seconds"]))


def middle(runs: Sequence[Figures], key: str) -> float:
    """Return the median of a figure over a side's runs."""
    return float(median(run[key] for run in runs))


def interpreter_mb() -> float:
    """Return the resident memory of an idle Python interpreter, in MiB."""
    code = "import re; print(re.search(r'VmRSS:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return int(run.stdout) / 1024
