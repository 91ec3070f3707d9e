"""Timing several calls side by side: in turn, within one process, as medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

SHAPES = ((2048, 2048), (4096, 4096), (4096, 14336), (14336, 4096))  # of weights, (out, in)

# The calls of one line of a table, by contender: lorakit, the installed peers and the references.
Calls = dict[str, Callable[[], object]]


def medians(calls: Mapping[str, Callable[[], object]], rounds: int = 15) -> dict[str, float]:
    """Return the median seconds of each call.

    They take turns, so that other load on the machine affects all of them. A first round is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(taken) for name, taken in seconds.items()}


def size_of(shape: tuple[int, int]) -> str:
    """Return a weight's shape in the tables' wording."""
    return f"{shape[0]} x {shape[1]}"
