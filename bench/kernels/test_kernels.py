"""The calls of the kernels' measurements under pytest-benchmark, for its statistics, histograms and comparisons.

Calls and sizes come from the modules. There the contenders take turns. Here each runs all its rounds alone, so other
load on the machine may affect only one of them.

Run as: pytest bench --benchmark-only      (-k "dequantize and 4096" for some; part of no other run of the tests)
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Any

import pytest

from bench.harness.timing import Calls
from bench.kernels import decode, dequantize, linear4bit, quantize


def name_of(module: ModuleType, size: tuple[Any, ...]) -> str:
    """Return the name of a line of a module's table: "decode 4096x14336 1"."""
    shape, *tokens = size
    return " ".join([module.__name__.rpartition(".")[2], "x".join(map(str, shape)), *map(str, tokens)])


CASES = [
    pytest.param(module, size, contender, id=f"{name_of(module, size)} {contender}".replace(" ", "-"))
    for module in (dequantize, quantize, decode, linear4bit)
    for size in module.SIZES
    for contender in module.CONTENDERS
]


@lru_cache(maxsize=1)  # the contenders of a size follow one another
def calls(module: ModuleType, size: tuple[Any, ...]) -> Calls:
    """Return the calls of one line of a module's table."""
    result: Calls = module.calls(*size)
    return result


@pytest.mark.parametrize(("module", "size", "contender"), CASES)
def test_kernel(benchmark: Any, module: ModuleType, size: tuple[Any, ...], contender: str) -> None:
    table = calls(module, size)
    if contender not in table:
        pytest.skip(f"{contender} is not installed")
    benchmark.group = name_of(module, size)
    benchmark.pedantic(table[contender], rounds=5, warmup_rounds=1)
