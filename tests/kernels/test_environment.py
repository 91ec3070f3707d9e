"""What importing lorakit sets for PyTorch's CPU libraries."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from lorakit_kernels.environment import KEPT_KERNELS

NAMES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
GROWTH = """
import {first}
import {second}
import torch
from pathlib import Path
def resident(): return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
weights = [torch.randn(shape).bfloat16() for shape in ((576, 576), (192, 576), (1536, 576), (576, 1536))]
def step(rows):
    for weight in weights:
        y = torch.randn(rows, weight.shape[1]).bfloat16() @ weight.t()
        y @ weight
step(199)
before = resident()
for rows in range(200, 300):
    step(rows)
print(resident() - before)
"""


def run(code: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in NAMES} | variables
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    ).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("order", [("lorakit", "torch"), ("torch", "lorakit"), ("torch", "lorakit_kernels")])
def test_products_of_ever_new_shapes_do_not_fill_the_memory(order: tuple[str, str]) -> None:
    grown = float(run(GROWTH.format(first=order[0], second=order[1])))
    assert grown < 2 * KEPT_KERNELS  # MiB; a kernel takes about 1, and 100 sizes of rows need 600 of them


def test_the_users_own_values_stay() -> None:
    code = f"import os, lorakit; print(*(os.environ[name] for name in {NAMES}))"
    assert run(code, ONEDNN_PRIMITIVE_CACHE_CAPACITY="7").split() == ["7", str(KEPT_KERNELS)]
