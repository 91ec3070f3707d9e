"""The C++ operations under GCC's sanitizers: memory and undefined behaviour, and races between threads.

Run as: make sanitize. What each program does and how it shows that it can fail stands at its top: `sanitize_cases.py`
for AddressSanitizer and UBSan, `threads.cpp` for ThreadSanitizer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lorakit_kernels import cpu
from lorakit_kernels.cpu import build, loading

HERE, SOURCES = Path(__file__).parent, Path(build.__file__).parent


def runtime(name: str) -> str:
    """Return the path of a sanitizer's runtime, which is the bare name where GCC does not have it."""
    if not shutil.which("g++"):
        return name
    return subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


pytestmark = pytest.mark.skipif(not Path(runtime("libasan.so")).is_absolute(), reason="needs g++ and its sanitizers")


@pytest.mark.parametrize("instruction_set", cpu.instruction_sets())
def test_nothing_is_touched_outside_of_a_tensor(instruction_set: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(HERE / "sanitizing-compiler"))
    build.library_path(instruction_set)  # here, where the compiler itself is not sanitized
    changes = {
        "LORAKIT_CPU_ISA": instruction_set,
        "LD_PRELOAD": runtime("libasan.so"),
        "ASAN_OPTIONS": "detect_leaks=0",  # of Python itself
        "OMP_NUM_THREADS": "2",
    }
    result = subprocess.run(
        [sys.executable, str(HERE / "sanitize_cases.py")], env=os.environ | changes, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[:8000]
    assert set(result.stdout.split()) == set(loading.SIGNATURES)


def test_threads_do_not_race(tmp_path: Path) -> None:
    program = tmp_path / "threads"
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", "-ffp-contract=off", "-Wno-psabi", "-pthread"]
    flags += build.INSTRUCTION_SETS[cpu.instruction_sets()[-1]]
    sources = [HERE / "threads.cpp", *sorted(SOURCES.glob("*.cpp"))]
    subprocess.run(["g++", *flags, "-I", str(SOURCES), *map(str, sources), "-o", str(program)], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[:8000]
    assert set(result.stdout.split()) == set(loading.SIGNATURES), "threads.cpp does not cover every operation"
    control = subprocess.run([program, "race"], capture_output=True, text=True)
    assert control.returncode != 0 and "WARNING: ThreadSanitizer: data race" in control.stderr
