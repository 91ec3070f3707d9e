"""Dequantizing NF4 to bf16, blocks of 64, double quantization included: lorakit, bitsandbytes, torchao, a plain copy.

lorakit is measured as its layers use it, `QuantizedWeight.dequantize(out=buffer)` with a reused buffer, and with a
fresh result. The others offer no buffer, so their results are always fresh.

Memory sets the limit: the time of a copy of the bf16 matrix between two buffers, measured in the same turns, times the
share of its bytes that dequantizing moves. A copy moves 4 bytes a weight. Dequantizing reads 0.5 bytes of codes and
1/64 of scales and writes 2.

Run as: python -m bench.dequantize [--check] [--json FILE] [--plot FILE] [--rounds 15]
With LORAKIT_CPU_ISA=avx2 before it, for that path.
"""

from __future__ import annotations

import os

import torch

from bench.harness import peers
from bench.harness.plot import Picture
from bench.harness.report import Target, arguments, finish, milliseconds, ratio
from bench.harness.timing import SHAPES, Calls, medians, size_of
from lorakit import quantize

SIZES = tuple((shape,) for shape in SHAPES)
CONTENDERS = ("reused buffer", "fresh", "bitsandbytes", "torchao", "copy")
CODES = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight of codes, their scales, and the scales of scales
MOVED, COPIED = CODES + 2, 4  # bytes a weight that dequantizing and the copy move


def calls(shape: tuple[int, int]) -> Calls:
    """Return the calls that take turns, by contender."""
    weight = torch.randn(shape).bfloat16()
    ours, out = quantize(weight), torch.empty_like(weight)
    result: Calls = {"reused buffer": lambda: ours.dequantize(out=out), "fresh": ours.dequantize}
    if peers.has("bitsandbytes"):
        result["bitsandbytes"] = peers.dequantized_by_bitsandbytes(weight)
    if peers.has("torchao"):
        result["torchao"] = peers.dequantized_by_torchao(weight)
    return result | {"copy": lambda: out.copy_(weight)}


def main() -> None:
    """Measure, print, compare with the targets."""
    parser = arguments(str(__doc__), plots=True)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each call")
    options = parser.parse_args()
    is_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512" and "LORAKIT_CPU_ISA" not in os.environ
    rows, targets, picture = [], [], Picture("milliseconds")
    for shape in SHAPES:
        seen = medians(calls(shape), options.rounds)
        seen["limit"] = seen["copy"] * MOVED / COPIED
        size, of_copy = size_of(shape), seen["reused buffer"] / seen["copy"]
        speedup = ratio(seen, "bitsandbytes", "reused buffer")
        rows.append([size, *(milliseconds(seen, name) for name in (*CONTENDERS, "limit")), speedup, of_copy])
        picture.add(size, seen, CONTENDERS[:-1], ("limit", "copy"))
        if speedup is not None:
            targets.append(Target(f"{size}: times bitsandbytes' speed", speedup, 8 if is_avx512 else 3, at_least=True))
        if is_avx512:
            targets.append(Target(f"{size}: time of a copy", of_copy, 1.2))
    columns = ["weight", *CONTENDERS, "limit", "bnb / ours", "ours / copy"]
    finish(options, "NF4 with double quantization to bf16, medians in ms", columns, rows, targets, picture)


if __name__ == "__main__":
    main()
