"""Building the C++ library: once, by one of many processes, and doing without it when that fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lorakit_kernels.cpu import instruction_sets
from lorakit_kernels.cpu.build import INSTRUCTION_SETS, BuildError, library_path

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")

# Quantizes a weight with the best backend and compares with the reference; prints what the process did.
PROGRAM = """
import re, warnings
from pathlib import Path
import torch
import lorakit
from lorakit_kernels import dispatch, use_backend

cache = Path({cache!r})
assert not list(cache.glob("kernels/*")), "importing must build nothing"
runtimes = lambda: set(re.findall(r"/\\S*omp\\S*", Path("/proc/self/maps").read_text()))
weight = torch.randn(48, 50).bfloat16()
before = runtimes()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    first, again = lorakit.quantize(weight), lorakit.quantize(weight, "fp4").dequantize()
assert runtimes() == before, "a second OpenMP runtime was loaded"
with use_backend("reference"):
    assert torch.equal(first.packed, lorakit.quantize(weight).packed)
print(dispatch.backend(weight.device).__name__, [str(warning.message) for warning in caught])
"""


def run(cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("LORAKIT_") and key != "CXX"}
    environment = {**clean, "LORAKIT_CACHE": str(cache), **environment}
    command = [sys.executable, "-c", PROGRAM.format(cache=str(cache))]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that notes each compilation in a file beside it, as CXX."""
    path = tmp_path / "noting-compiler"
    path.write_text(f'#!/bin/sh\ncase "$*" in *ops.cpp*) echo $$ >> {path}.log; sleep 1;; esac\nexec g++ "$@"\n')
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    return path


@needs_compiler
def test_the_first_operation_builds(cache: Path) -> None:
    result = run(cache)
    assert result.stdout == "lorakit_kernels.cpu []\n", result.stderr
    assert result.stderr == ""
    assert [path.suffix for path in sorted((cache / "kernels").iterdir())] == [".lock", ".so"]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PATH": "/nowhere"}, "there is no C++ compiler (g++, clang++, c++) in PATH"),
        ({"CXX": "/bin/false"}, "`/bin/false --version` failed with status 1"),
    ],
)
def test_without_a_compiler_there_is_one_warning_and_the_same_result(
    tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    result = run(tmp_path, **environment)
    name, _, warnings = result.stdout.partition(" ")
    assert name == "lorakit_kernels.reference", result.stderr
    assert warnings.count("slower path in plain PyTorch") == 1
    assert reason in warnings


@needs_compiler
@pytest.mark.skipif(len(instruction_sets()) == 1, reason="needs a processor with AVX2")
def test_where_the_best_instructions_are_refused_smaller_ones_are_built(cache: Path, tmp_path: Path) -> None:
    path, best = tmp_path / "old-cc", instruction_sets()[-1]
    refused = INSTRUCTION_SETS[best][-1]
    path.write_text(
        f'#!/bin/sh\ncase "$*" in *{refused}*) echo "error: no {refused}" >&2; exit 1;; esac\nexec g++ "$@"\n'
    )
    path.chmod(0o755)
    result = run(cache, CXX=str(path))
    smaller = [name for name in instruction_sets() if refused not in INSTRUCTION_SETS[name]][-1]
    assert result.stdout.startswith("lorakit_kernels.cpu "), result.stderr
    assert f"computes with {smaller} instructions, not with {best}: " in result.stdout
    assert f"failed with status 1: error: no {refused}" in result.stdout and result.stdout.count("computes with") == 1
    asked = run(tmp_path / "other", CXX=str(path), LORAKIT_CPU_ISA=best, LORAKIT_BACKEND="cpu")
    assert asked.returncode == 1 and f"BuildError: `{path}" in asked.stderr  # what was asked for is not replaced


def test_a_backend_that_was_asked_for_is_not_replaced(tmp_path: Path) -> None:
    result = run(tmp_path, CXX="/bin/false", LORAKIT_BACKEND="cpu")
    assert result.returncode == 1
    assert "BuildError: `/bin/false --version` failed with status 1" in result.stderr


@needs_compiler
def test_processes_that_start_together_build_once(cache: Path, compiler: Path) -> None:
    program = "from lorakit_kernels.cpu.build import library_path; print(library_path('generic'))"
    both = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate()[0].strip() for process in both}
    assert paths == {str(library_path("generic"))}
    assert len(Path(f"{compiler}.log").read_text().split()) == 1
    assert sorted(path.suffix for path in (cache / "kernels").iterdir()) == [".lock", ".so"]


@needs_compiler
def test_flags_and_compiler_are_part_of_the_name(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = library_path("generic")
    monkeypatch.setenv("CXX", "g++ -g0")  # arguments are allowed
    assert library_path("generic") != plain


@needs_compiler
def test_a_compiler_error_is_quoted_and_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ -include no-such-file.h")
    with pytest.raises(BuildError, match=r"failed with status 1: .*fatal error: no-such-file.h"):
        library_path("generic")
    assert [path.suffix for path in (cache / "kernels").iterdir()] == [".lock"]


@needs_compiler
def test_a_damaged_library_is_built_again(cache: Path) -> None:
    path = library_path("generic")
    path.write_bytes(b"not a library")
    program = "import torch; from lorakit_kernels import cpu; print(cpu.library()._name)"
    environment = {**os.environ, "LORAKIT_CPU_ISA": "generic"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == str(path), result.stderr
    assert path.read_bytes()[:4] == b"\x7fELF"


@needs_compiler
def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(BuildError, match=r"cannot write to .*kernels.*LORAKIT_CACHE names another folder"):
        library_path("generic")
