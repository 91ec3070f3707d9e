"""The Triton kernels without a GPU: compiles each for every target and counts instructions.

The table has, for each kernel and target: registers a thread, shared memory, spills, instructions a weight (or element,
if the operation has no weights), bytes of global memory moved a weight, the widest load and store of global memory, and
tensor-core instructions. Instructions a weight are those of the whole kernel divided by its weights; for products and
cross-entropy, those of its loops. `bench/gpu/static_cases.py` describes how bytes are counted. bitsandbytes' own kernel
is read from its library if that is installed.

None of these figures is a time: no GPU has run these kernels here.

Run as: python -m bench.static_gpu [--only TEXT] [--check] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from bench.gpu import sass
from bench.gpu.static_cases import Case, cases
from bench.harness.plot import Picture
from bench.harness.report import Target, arguments, finish

TARGETS = [GPUTarget("cuda", number, 32) for number in (80, 86, 89, 90, 100)] + [GPUTarget("hip", "gfx942", 64)]
DRAWN = ("sm_86", "sm_90", "gfx942")  # three of the six, to keep the picture readable
PEER = re.compile(r"kDequantizeBlockwise\w*nv_bfloat16Li512ELi64ELi8ELi2E")  # NF4, 64 threads for 1024 weights
PEER_WEIGHTS = 16  # weights of a thread
PEER_BYTES = 2.5 + 4 / 64  # its scales are fp32, expanded by another kernel
COLUMNS = [
    "kernel", "target", "registers", "shared", "spills", "instr. a weight", "bytes a weight", "load", "store",
    "tensor cores",
]  # fmt: skip


def peer() -> list[object] | None:
    """Return bitsandbytes' row, from its newest installed CUDA library."""
    spec = importlib.util.find_spec("bitsandbytes")
    if spec is None or spec.origin is None:
        return None
    for library in sorted(Path(spec.origin).parent.glob("libbitsandbytes_cuda*.so"), reverse=True):
        if found := sass.from_library(library, "sm_90", PEER):
            code = found[1]
            return [
                "bitsandbytes dequantize", "sm_90", code.registers, "", code.spills, len(code.names) / PEER_WEIGHTS,
                PEER_BYTES, code.load_bytes, code.store_bytes, "",
            ]  # fmt: skip
    return None


def main() -> None:
    """Compile, count, print, check."""
    parser = arguments(str(__doc__), plots=True)
    parser.add_argument("--only", default="", help="only kernels whose names contain this")
    options = parser.parse_args()
    rows: list[list[object]] = []
    targets: list[Target] = []
    picture = Picture("instructions a weight or element")
    for target in TARGETS:
        for case in cases(target.warp_size):
            if options.only not in case.name:
                continue
            name = f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
            compiled = case.compile(target)
            code = sass.nvidia(compiled.asm["cubin"]) if "cubin" in compiled.asm else sass.amd(compiled.asm["amdgcn"])
            a_weight = counted(case, code) * compiled.metadata.num_warps * target.warp_size / case.per_program
            rows.append([
                case.name, name, code.registers, compiled.metadata.shared, code.spills, a_weight, case.bytes_moved,
                code.load_bytes, code.store_bytes, code.tensor_cores,
            ])  # fmt: skip
            targets += checks(case, name, code, a_weight)
            if name in DRAWN:
                picture.bars.setdefault(case.name, {})[name] = a_weight
    if row := peer():
        rows.append(row)
        picture.bars[str(row[0])] = {str(row[1]): float(str(row[5]))}
    title = f"Compiled by Triton {triton.__version__}; not run on a GPU"
    finish(options, title, COLUMNS, rows, targets, picture)


def counted(case: Case, code: sass.Code) -> int:
    """Return the number of instructions for the work that `case.per_program` counts."""
    if case.is_product:
        return len(code.loop)
    return sum(map(len, code.loops)) if case.in_loops else len(code.names)


def checks(case: Case, name: str, code: sass.Code, a_weight: float) -> list[Target]:
    """Return the targets of a kernel on a GPU target."""
    label = f"{case.name}, {name}"
    result = [Target(f"{label}: spills", code.spills, 0)]
    if case.is_product:
        result.append(Target(f"{label}: kinds of tensor-core instructions", len(code.tensor_cores.split()), 1, True))
    if case.name.startswith("dequantize_4bit"):
        result.append(Target(f"{label}: bytes of the widest load", code.load_bytes, 16, True))
        result.append(Target(f"{label}: bytes of the widest store", code.store_bytes, 16, True))
        if name == "sm_90":
            result.append(Target(f"{label}: instructions a weight", a_weight, 10))
    return result


if __name__ == "__main__":
    main()
