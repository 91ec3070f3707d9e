"""Reads compiled GPU code: the number of instructions, the width of loads and stores, the main loop.

The disassemblers come from Triton's wheel. The AMD code is the assembly that Triton passes to the assembler.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)([^;]*);")
_AMD = re.compile(r"^\s+([a-z]+_[\w.]+)\s*([^;\n]*)")
_TENSOR_CORES = re.compile(r"HMMA|HGMMA|UTC\w*MMA|v_mfma")


@dataclass(frozen=True)
class Code:
    """The instructions of a kernel.

    Attributes:
        names: names of the instructions, in order, without the padding at the end.
        loops: names within each outermost loop, in order.
        registers: registers of a thread, accumulation registers included.
        spills: number of instructions that move registers to local memory or back.
    """

    names: list[str]
    loops: list[list[str]]
    registers: int
    spills: int

    @property
    def loop(self) -> list[str]:
        """Names within the longest loop; empty if there is none."""
        return max(self.loops, key=len, default=[])

    @property
    def load_bytes(self) -> int:
        """Bytes of the widest load from global memory."""
        return max(
            (_width(name) for name in self.names if re.match(r"LDG|LDGSTS|(global|buffer)_load", name)), default=0
        )

    @property
    def store_bytes(self) -> int:
        """Bytes of the widest store to global memory."""
        return self._widest(r"STG|(global|buffer)_store")

    def _widest(self, names: str) -> int:
        return max((_width(name) for name in self.names if re.match(names, name)), default=0)

    @property
    def tensor_cores(self) -> str:
        """The tensor-core instructions, without variants."""
        return " ".join(sorted({found[0] for name in self.names if (found := _TENSOR_CORES.match(name))}))


def _width(name: str) -> int:
    """Return the bytes that a load or store moves for one thread."""
    if found := re.search(r"dwordx(\d)$|\.(64|128)\b", name):
        return int(found[1]) * 4 if found[1] else int(found[2]) // 8
    if re.search(r"\.[US]8\b|[us]?byte", name):
        return 1
    return 2 if re.search(r"\.[US]16\b|short", name) else 4


def nvidia(cubin: bytes) -> Code:
    """Read a cubin that holds one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        return from_sass(_run("cuobjdump", "--dump-sass", file.name), int(re.findall(r"REG:(\d+)", usage)[0]))


def from_sass(listing: str, registers: int) -> Code:
    """Read a listing of one kernel."""
    found = [(int(address, 16), name, rest) for address, name, rest in _SASS.findall(listing)]
    # The padding: a branch to itself and NOPs.
    while found and (found[-1][1] == "NOP" or (found[-1][1] == "BRA" and int(found[-1][2], 16) == found[-1][0])):
        found.pop()
    names = [name for _, name, _ in found]
    spans = [
        (int(target[0], 16), address)
        for address, name, rest in found
        if name.startswith("BRA") and (target := re.findall(r"0x[0-9a-f]+", rest)) and int(target[0], 16) < address
    ]
    loops = [[name for address, name, _ in found if first <= address <= last] for first, last in _outermost(spans)]
    return Code(names, loops, registers, sum(name.startswith(("LDL", "STL")) for name in names))


def amd(assembly: str) -> Code:
    """Read the assembly of one kernel."""
    labels: dict[str, int] = {}
    names: list[str] = []
    spans: list[tuple[int, int]] = []
    for line in assembly.split(".end_amdhsa_kernel")[0].splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(names)
        elif found := _AMD.match(line):
            names.append(found[1])
            if found[1].startswith(("s_cbranch", "s_branch")) and found[2].strip() in labels:
                spans.append((labels[found[2].strip()], len(names) - 1))
    registers, spills = (
        sum(int(number) for number in re.findall(rf"\.{field}:\s+(\d+)", assembly))
        for field in ("vgpr_count", "[sv]gpr_spill_count")
    )
    return Code(names, [names[first : last + 1] for first, last in _outermost(spans)], registers, spills)


def _outermost(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the spans (first, last) that lie in no other."""
    result: list[tuple[int, int]] = []
    for first, last in sorted(spans, key=lambda span: (span[0], -span[1])):
        if not result or first > result[-1][1]:
            result.append((first, last))
    return result


def from_library(library: Path, architecture: str, kernel: re.Pattern[str]) -> tuple[str, Code] | None:
    """Return name and code of the first kernel in a shared library whose mangled name matches."""
    symbols = _run("cuobjdump", "--dump-elf-symbols", "--gpu-architecture", architecture, str(library))
    names = [name for name in re.findall(r"STO_ENTRY\s+(\S+)", symbols) if kernel.search(name)]
    if not names:
        return None
    options = ("--gpu-architecture", architecture, "--function", names[0], str(library))
    usage = _run("cuobjdump", "--dump-resource-usage", *options)
    registers = re.findall(rf"{re.escape(names[0])}:\s*REG:(\d+)", usage)
    return names[0], from_sass(_run("cuobjdump", "--dump-sass", *options), int(registers[0]) if registers else 0)


def _run(program: str, *arguments: str) -> str:
    return subprocess.run([BIN / program, *arguments], capture_output=True, text=True, check=True).stdout
