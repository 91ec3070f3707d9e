"""What `import lorakit` brings along, and that it needs no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lorakit

HEAVY = [
    "transformers", "peft", "bitsandbytes", "triton", "sacrebleu", "jsonschema", "gguf", "matplotlib", "typer",
    "torch._dynamo", "torch._inductor", "torch.utils.cpp_extension", "pandas", "scipy", "datasets",
]  # fmt: skip


def run(script: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_brings_none_of_the_heavy_packages_along() -> None:
    script = "import sys, torch; before = set(sys.modules); import lorakit; print(*(set(sys.modules) - before))"
    brought = set(run(script).split())
    assert "lorakit.training.trainer" in brought
    assert brought.isdisjoint(HEAVY), brought.intersection(HEAVY)


@pytest.mark.skipif(sys.platform == "win32", reason="PATH")
def test_it_works_where_there_is_no_compiler(tmp_path: Path) -> None:
    script = (
        "import shutil, torch, lorakit as lk\n"
        "assert shutil.which('g++') is None and shutil.which('c++') is None\n"
        "weight = torch.randn(64, 64)\n"
        "layer = lk.Linear4bit(lk.quantize(weight))\n"
        "model = torch.nn.Sequential(layer)\n"
        "lk.add_adapter(model, lk.LoraConfig(r=2))\n"
        "model(torch.randn(3, 64)).sum().backward()\n"
        "print((layer.dense_weight(torch.float32) - weight).abs().max().item())\n"
    )
    compilers = {"PATH": str(tmp_path), "CXX": "", "CC": "", "LORAKIT_CACHE": str(tmp_path / "cache")}
    assert float(run(script, **compilers)) < 1


def test_every_public_name_is_there_and_documented() -> None:
    for name in lorakit.__all__:
        assert getattr(lorakit, name).__doc__, name
