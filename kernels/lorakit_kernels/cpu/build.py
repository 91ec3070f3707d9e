"""Compiles the C++ operations on first use, once per machine, into the cache.

One call of the compiler turns the `.cpp` files beside this one into a shared library with a plain C interface, which
`ctypes` loads. This takes five seconds. The usual way, torch.utils.cpp_extension, needs ninja, reads PyTorch's headers
and takes 40. There is one library per instruction set, compiled with the flags of that set alone. Its name is a hash of
source, flags and compiler, which are all that it depends on, so a cache on a shared disk serves different machines.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ..cache import cache_folder, exclusive_lock

_AVX512 = ("-mavx512f", "-mavx512bw")
INSTRUCTION_SETS = {  # each includes those before it
    "generic": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": _AVX512,
    "avx512_bf16": (*_AVX512, "-mavx512bf16"),
}

# Strict IEEE: no contraction of a * b + c into one rounding. -O3 alone changes no result. Neither does -fno-math-errno,
# without which a square root compiles to a branch instead of a vector instruction.
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi", "-fPIC", "-shared")
_FOLDER = Path(__file__).parent
_SOURCES = ("ops.cpp", "matmul.cpp", "elementwise.cpp", "adamw.cpp")
_HEADERS = ("blocks.h", "dequantize.h", "lanes.h", "products.h")
_TIMEOUT = 300  # seconds; five to ten are usual
_OTHER_FOLDER = "LORAKIT_CACHE names another folder"


class BuildError(RuntimeError):
    """The library cannot be built. The message says why and what would help."""


def library_path(instruction_set: str) -> Path:
    """Return the compiled library for one of `INSTRUCTION_SETS`; compile it if the cache has none.

    Raises:
        BuildError: there is no compiler, it fails, or the cache cannot be written.
    """
    if sys.platform == "win32":
        raise BuildError("the C++ kernels are not built on Windows")
    compiler = _compiler()
    flags = (*_FLAGS, *INSTRUCTION_SETS[instruction_set])
    try:
        folder = cache_folder() / "kernels"
    except RuntimeError as error:  # a user without a home, as in some containers
        raise BuildError(f"{error}; {_OTHER_FOLDER}") from error
    try:
        path = folder / f"cpu-{instruction_set}-{_key(compiler, flags)}.so"
        if not path.exists():
            with exclusive_lock(path.with_suffix(".lock")):
                if not path.exists():  # another process may have built it while this one waited
                    _compile(compiler, flags, path)
        return path
    except OSError as error:
        raise BuildError(f"cannot write to {folder}: {error.strerror}; {_OTHER_FOLDER}") from error


def _compiler() -> list[str]:
    """Return the compiler's command: $CXX, which may hold arguments, or the first usual compiler in PATH."""
    if command := shlex.split(os.environ.get("CXX", "")):
        return command
    for name in ("g++", "clang++", "c++"):
        if found := shutil.which(name):
            return [found]
    raise BuildError("there is no C++ compiler (g++, clang++, c++) in PATH; install one or name it in CXX")


def _key(compiler: list[str], flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256(_run([*compiler, "--version"]).encode())
    digest.update(" ".join([*compiler, *flags]).encode())
    for name in (*_SOURCES, *_HEADERS):
        digest.update((_FOLDER / name).read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: list[str], flags: tuple[str, ...], path: Path) -> None:
    """Compile beside `path`, flush and rename, so that no process ever loads half a library."""
    with tempfile.TemporaryDirectory(prefix=".build-", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        _run([*compiler, *flags, *(str(_FOLDER / name) for name in _SOURCES), "-o", str(temporary)])
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _run(command: list[str]) -> str:
    """Return what a command prints; if it fails, the error quotes the first line that tells why."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"cannot run the C++ compiler: {error}") from error
    if result.returncode:
        lines = result.stderr.splitlines()
        reason = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
        raise BuildError(f"`{shlex.join(command)}` failed with status {result.returncode}: {reason}")
    return result.stdout
