"""The Triton kernels: as their definitions say in the interpreter, and compiled for every target.

Neither needs a GPU. The interpreter is chosen before triton is imported, and for a whole process, so those tests are in
`triton_*_cases.py` and run in processes of their own.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULES = ("rms_norm", "rope", "swiglu", "dropout", "cross_entropy", "adamw_8bit")
NVIDIA, AMD = (80, 86, 89, 90, 100), ("gfx942",)

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")


@needs_triton
@pytest.mark.parametrize("kind", ["4bit", "training"])
def test_kernels_are_their_definitions_in_the_interpreter(kind: str) -> None:
    cases = Path(__file__).with_name(f"triton_{kind}_cases.py")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(cases)]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@needs_triton
@pytest.mark.parametrize("module", MODULES)
def test_kernels_compile_for_every_target(module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    triton = importlib.import_module("triton")
    target = importlib.import_module("triton.backends.compiler").GPUTarget
    targets = [*(target("cuda", arch, 32) for arch in NVIDIA), *(target("hip", arch, 64) for arch in AMD)]
    sources = list(importlib.import_module(f"lorakit_kernels.triton.{module}").sources())
    assert len({name for name, _ in sources}) == len(sources) >= 2
    for name, source in sources:
        for each in targets:
            compiled = triton.compile(source, target=each, options={"enable_fp_fusion": False})
            assert compiled.asm["hsaco" if each.backend == "hip" else "cubin"], f"{name} for {each.arch}"
            if module == "adamw_8bit" and each.backend == "cuda":  # what bit-equality rests on
                ptx = compiled.asm["ptx"]
                assert "div.rn.f32" in ptx and "sqrt.rn.f32" in ptx and "ftz" not in ptx
                assert "fma.rn" not in ptx and "approx" not in ptx


def test_lorakit_does_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, lorakit_kernels as kernels\n"
        "from lorakit.layers import RMSNorm\n"
        "x = torch.randn(3, 8, requires_grad=True)\n"
        "kernels.swiglu(RMSNorm(8, 1e-5).requires_grad_(False)(x), x).sum().backward()\n"
        "assert not [name for name in sys.modules if name.startswith('lorakit_kernels.triton')]\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
