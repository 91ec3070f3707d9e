"""Quantizing bf16 weights to NF4, blocks of 64, with double quantization: lorakit, bitsandbytes, torchao.

Memory sets the limit: the time of a copy of the bf16 matrix between two buffers, measured in the same turns, times the
share of its bytes that quantizing moves. A copy moves 4 bytes a weight; quantizing reads 2 and writes 0.52.

Run as: python -m bench.quantize [--check] [--json FILE] [--plot FILE] [--rounds 5]
"""

from __future__ import annotations

import torch

from bench.harness import peers
from bench.harness.plot import Picture
from bench.harness.report import Target, arguments, finish, milliseconds, ratio
from bench.harness.timing import SHAPES, Calls, medians, size_of
from bench.kernels.dequantize import CODES, COPIED
from lorakit import quantize

SIZES = tuple((shape,) for shape in SHAPES)
CONTENDERS = ("lorakit", "bitsandbytes", "torchao", "copy")
MOVED = 2 + CODES


def calls(shape: tuple[int, int]) -> Calls:
    """Return the calls that take turns, by contender."""
    weight = torch.randn(shape).bfloat16()
    out = torch.empty_like(weight)
    result: Calls = {"lorakit": lambda: quantize(weight)}
    if peers.has("bitsandbytes"):
        result["bitsandbytes"] = peers.quantized_by_bitsandbytes(weight)
    if peers.has("torchao"):
        result["torchao"] = peers.quantized_by_torchao(weight)
    return result | {"copy": lambda: out.copy_(weight)}


def main() -> None:
    """Measure, print, compare with the target."""
    parser = arguments(str(__doc__), plots=True)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each call")
    options = parser.parse_args()
    rows, targets, picture = [], [], Picture("milliseconds")
    for shape in SHAPES:
        seen = medians(calls(shape), options.rounds)
        seen["limit"] = seen["copy"] * MOVED / COPIED
        size, speedup = size_of(shape), ratio(seen, "bitsandbytes", "lorakit")
        rows.append([size, *(milliseconds(seen, name) for name in (*CONTENDERS, "limit")), speedup])
        picture.add(size, seen, CONTENDERS[:-1], ("limit", "copy"))
        if speedup is not None:
            targets.append(Target(f"{size}: times bitsandbytes' speed", speedup, 20, at_least=True))
    columns = ["weight", *CONTENDERS, "limit", "bnb / ours"]
    finish(options, "bf16 to NF4 with double quantization, medians in ms", columns, rows, targets, picture)


if __name__ == "__main__":
    main()
