"""What runs on a user's GPU, run on the CPU: the same cases, checks, clock and files, at small shapes."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
import torch

from bench.gpu import gpu_cases, gpu_training_cases
from bench.gpu import measure as gpu
from bench.gpu.gpu_cases import Case, Setting, close, differing, of_bound

ROOT = Path(__file__).parents[3]
NO_GPU = dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"), "")
SMALL = Setting.small(torch.device("cpu"), torch.bfloat16)


@pytest.fixture(scope="module", autouse=True)
def eager() -> Iterator[None]:
    """torchao is not compiled here, which takes seconds."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def test_every_case_is_right_and_every_rival_runs() -> None:
    operations = set()
    for case in chain(gpu_cases.cases(SMALL), gpu_training_cases.cases(SMALL)):
        verdict, is_right = gpu.checked(case)
        assert is_right, f"{case.operation}, {case.size}: {verdict}"
        seen = dict(gpu.measured(case, gpu.clock_of(SMALL.device)))
        assert list(seen) == list(gpu.RIVALS)
        assert isinstance(seen["lorakit"], float) and isinstance(seen["PyTorch"], float), seen
        assert not any(str(time).startswith("failed") for time in seen.values()), seen
        operations.add(case.operation.partition(",")[0])
    assert operations == {
        "quantize", "dequantize", "linear_4bit", "linear_4bit_dx", "Linear4bit", "rms_norm", "rms_norm_backward",
        "rope", "rope_backward", "swiglu", "swiglu_backward", "drop", "cross_entropy with gradient", "adamw_8bit",
    }  # fmt: skip


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")
def test_the_triton_kernels_go_through_the_command(tmp_path: Path) -> None:
    files = [
        "--json",
        str(tmp_path / "a.json"),
        "--markdown",
        str(tmp_path / "a.md"),
        "--plot",
        str(tmp_path / "a.svg"),
    ]
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--small", "--check", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1", "LORAKIT_BACKEND": "triton"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads((tmp_path / "a.json").read_text())
    checked = {row["operation"]: row["error / bound"] for row in figures["rows"]}
    assert [name for name, verdict in checked.items() if verdict == "bit-equal"] == [
        "quantize",
        "dequantize",
        "drop",
        "adamw_8bit",
    ]
    assert all(float(verdict) <= 1 for verdict in checked.values() if verdict != "bit-equal")
    assert figures["machine"]["LORAKIT_BACKEND"] == "triton" and figures["targets"][0]["met"]
    assert len((tmp_path / "a.md").read_text().splitlines()) == 2 + len(figures["rows"])
    assert (tmp_path / "a.svg").stat().st_size > 10_000


@pytest.mark.parametrize("command", [[sys.executable, "-m", "bench.gpu"], ["bash", "bench/gpu.sh", "report.md"]])
def test_without_a_gpu_it_says_so(command: list[str], tmp_path: Path) -> None:
    environment = os.environ | NO_GPU | {"PYTHON": sys.executable}
    command = [word.replace("report.md", str(tmp_path / "report.md")) for word in command]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.strip().splitlines()[-1] == gpu.NO_GPU
    assert not (tmp_path / "report.md").exists()


def test_wrong_results_are_found() -> None:
    x, y = torch.randn(8, 64).bfloat16(), torch.randn(64, 8).bfloat16()
    product = x @ y
    assert of_bound(product, (x, y)) <= 1 < of_bound(product * 1.02, (x, y))
    assert of_bound(product.index_fill(0, torch.tensor([3]), math.nan), (x, y)) == math.inf
    exact = torch.randn(100)
    assert close(exact.bfloat16(), exact) <= 1 < close(exact.bfloat16() * 1.1, exact)
    assert differing(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])) == 1
    assert differing(torch.zeros(2), torch.zeros(2).bfloat16()) == math.inf


@pytest.mark.parametrize(
    ("error", "exact", "expected"),
    [
        (0.0, True, ("bit-equal", True)), (3.0, True, ("WRONG: 3 elements differ", False)),
        (0.5, False, ("0.5", True)), (1.5, False, ("WRONG: 1.5", False)), (math.inf, False, ("WRONG: inf", False)),
    ],
)  # fmt: skip
def test_verdicts(error: float, exact: bool, expected: tuple[str, bool]) -> None:
    assert gpu.checked(Case("a", "b", lambda: error, exact, {})) == expected


def test_what_fails_does_not_end_the_table() -> None:
    def no_memory() -> float:
        raise torch.OutOfMemoryError("2 GiB")

    case = Case("a", "b", no_memory, False, {"lorakit": lambda: no_memory, "PyTorch": lambda: lambda: None})
    assert gpu.checked(case) == ("FAILED: OutOfMemoryError", False)
    seen = dict(gpu.measured(case, gpu.clock_of(torch.device("cpu"))))
    assert seen["lorakit"] == "failed: OutOfMemoryError" and isinstance(seen["PyTorch"], float)
    assert seen["torchao"] is None  # has no such operation
