"""What can be said of the Triton kernels without a GPU: compiles each for every target and counts instructions.

For a kernel and target: registers a thread, shared memory, spills, instructions a weight, the widest load and store of
global memory, tensor-core instructions. Instructions a weight are those of the whole kernel, or, of products, of the
main loop, that each thread runs for a weight. bitsandbytes' own kernel is read from its library where it is installed.

None of this is a time: no GPU has run these kernels here.

Run as: python -m bench.static_gpu [--only TEXT] [--check] [--json FILE]
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from lorakit_kernels.triton import decode, dequantize, linear, quantize, tiles
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import sass
from .report import Target, arguments, finish

TARGETS = [GPUTarget("cuda", number, 32) for number in (80, 86, 89, 90, 100)] + [GPUTarget("hip", "gfx942", 64)]
POINTERS = {
    "x": "*bf16", "dy": "*bf16", "y": "*bf16", "dx": "*bf16", "out": "*bf16", "bias": "*bf16",
    "u": "*bf16", "lora_b": "*bf16", "t": "*bf16", "lora_a": "*bf16", "packed": "*i32", "words": "i32", "order": "*u8",
    "codebook": "*fp32", "absmax": "*fp32", "boundaries": "*fp32",
    "nested_codebook": "*fp32", "nested_absmax": "*fp32", "nested_offset": "*fp32", "scaling": "fp32",
}  # fmt: skip
WITHOUT_NESTED = {"NESTED": 0, "nested_codebook": None, "nested_absmax": None, "nested_offset": None}
PEER = re.compile(r"kDequantizeBlockwise\w*nv_bfloat16Li512ELi64ELi8ELi2E")  # NF4, 64 threads for 1024 weights
PEER_WEIGHTS = 16  # a thread's


@dataclass(frozen=True)
class Case:
    """A kernel with its constants, as the library launches it for bf16, blocks of 64 and large weights."""

    name: str
    kernel: Any
    weights: int  # that a program turns over, once or in each step of its loop
    constants: dict[str, object]
    options: dict[str, object]
    types: dict[str, str] = field(default_factory=dict)
    tile: tiles.Tile | None = None  # of a product

    def compile(self, target: GPUTarget) -> Any:
        """Compile for a target: all pointers and sizes are multiples of 16, as those of real layers are."""
        names = self.kernel.arg_names
        types = {**POINTERS, **self.types}
        signature = {name: "constexpr" if name in self.constants else types.get(name, "i32") for name in names}
        aligned = {
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(names)
            if signature[name] != "constexpr" and not signature[name].startswith("fp")
        }
        source = ASTSource(self.kernel, signature, self.constants, aligned)
        options = self.tile.options(target.warp_size) if self.tile else {"enable_fp_fusion": False, **self.options}
        return triton.compile(source, target=target, options=options)


def cases(lanes: int) -> list[Case]:
    """Return every kernel, with the default tiles for warps of so many threads."""
    nested, coded = {"NESTED": 256}, {"absmax": "*u8"}
    unpacked = {"BLOCK": 64, "WORDS": dequantize.WORDS}
    result = [
        Case("dequantize_4bit", dequantize.dequantize_4bit_kernel, dequantize.WORDS * 8, unpacked | WITHOUT_NESTED,
             {"num_warps": dequantize.WARPS}),
        Case("dequantize_4bit nested", dequantize.dequantize_4bit_kernel, dequantize.WORDS * 8, unpacked | nested,
             {"num_warps": dequantize.WARPS}, coded),
        Case("dequantize_8bit", dequantize.dequantize_8bit_kernel, dequantize.VALUES_8BIT,
             {"BLOCK": 256, "VALUES": dequantize.VALUES_8BIT}, {"num_warps": 4}, {"codes": "*u8", "out": "*fp32"}),
        Case("quantize_4bit", quantize.quantize_kernel, quantize.VALUES,
             {"BLOCK": 64, "WIDTH": 64, "ROWS": quantize.VALUES // 64, "TABLE": 16}, {"num_warps": quantize.WARPS},
             {"codes": "*i32"}),
        Case("quantize_8bit", quantize.quantize_kernel, quantize.VALUES,
             {"order": None, "BLOCK": 256, "WIDTH": 256, "ROWS": quantize.VALUES // 256, "TABLE": 256},
             {"num_warps": quantize.WARPS}, {"codes": "*u8", "x": "*fp32"}),
    ]  # fmt: skip
    kernels = {
        "decode": decode.decode_kernel, "linear_4bit": linear.linear_kernel, "linear_4bit_dx": linear.linear_dx_kernel,
    }  # fmt: skip
    for family, kernel in kernels.items():
        tile = tiles.default(family, lanes)
        sizes = {"FEATURES": tile.features, "STEP": tile.step, "BLOCK": 64, "RANK_STEP": 16}
        if family != "decode":
            sizes["TOKENS"] = tile.tokens
        sizes["ONE_SCALE"] = 64 % (tile.features if family == "linear_4bit_dx" else tile.step) == 0
        weights = tile.features * tile.step
        result.append(Case(f"{family} nested", kernel, weights, sizes | nested, {}, coded, tile))
    return result


def peer() -> list[object] | None:
    """Return bitsandbytes' row, from the newest library for CUDA that it has installed."""
    spec = importlib.util.find_spec("bitsandbytes")
    if spec is None or spec.origin is None:
        return None
    for library in sorted(Path(spec.origin).parent.glob("libbitsandbytes_cuda*.so"), reverse=True):
        if found := sass.from_library(library, "sm_90", PEER):
            code = found[1]
            return [
                "bitsandbytes dequantize", "sm_90", code.registers, "", code.spills, len(code.names) / PEER_WEIGHTS,
                code.load_bytes, code.store_bytes, "",
            ]  # fmt: skip
    return None


def main() -> None:
    """Compile, count, print, check."""
    parser = arguments(str(__doc__))
    parser.add_argument("--only", default="", help="only kernels whose names contain this")
    options = parser.parse_args()
    rows: list[list[object]] = []
    targets: list[Target] = []
    for target in TARGETS:
        for case in cases(target.warp_size):
            if options.only not in case.name:
                continue
            name = f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
            compiled = case.compile(target)
            code = sass.nvidia(compiled.asm["cubin"]) if "cubin" in compiled.asm else sass.amd(compiled.asm["amdgcn"])
            threads = compiled.metadata.num_warps * target.warp_size
            a_weight = len(code.loop if case.tile else code.names) * threads / case.weights
            rows.append([
                case.name, name, code.registers, compiled.metadata.shared, code.spills, a_weight,
                code.load_bytes, code.store_bytes, code.tensor_cores,
            ])  # fmt: skip
            targets += checks(case, name, code, a_weight)
    if row := peer():
        rows.append(row)
    columns = ["kernel", "target", "registers", "shared", "spills", "instr/weight", "load", "store", "tensor cores"]
    finish(options, f"Compiled by Triton {triton.__version__}; not run on a GPU", columns, rows, targets)


def checks(case: Case, name: str, code: sass.Code, a_weight: float) -> list[Target]:
    """Return what must hold for a kernel on a target."""
    label = f"{case.name}, {name}"
    result = [Target(f"{label}: spills", code.spills, 0)]
    if case.tile:
        result.append(Target(f"{label}: kinds of tensor-core instructions", len(code.tensor_cores.split()), 1, True))
    if case.name.startswith("dequantize_4bit"):
        result.append(Target(f"{label}: bytes of the widest load", code.load_bytes, 16, True))
        result.append(Target(f"{label}: bytes of the widest store", code.store_bytes, 16, True))
        if name == "sm_90":
            result.append(Target(f"{label}: instructions a weight", a_weight, 10))
    return result


if __name__ == "__main__":
    main()
