"""Quantizing bf16 weights to NF4, blocks of 64, with double quantization: lorakit and bitsandbytes.

Run as: python -m bench.quantize [--check] [--json FILE] [--rounds 5]
"""

from __future__ import annotations

import torch
from bitsandbytes import functional as bnb

from lorakit import quantize

from .report import Target, arguments, finish
from .timing import SHAPES, medians


def main() -> None:
    """Measure, print, compare with the target."""
    parser = arguments(str(__doc__))
    parser.add_argument("--rounds", type=int, default=5, help="times that each call is measured")
    options = parser.parse_args()
    rows, targets = [], []
    for shape in SHAPES:
        weight = torch.randn(shape).bfloat16()
        seen = medians(
            {
                "lorakit": lambda weight=weight: quantize(weight),
                "bitsandbytes": lambda weight=weight: bnb.quantize_4bit(
                    weight, quant_type="nf4", compress_statistics=True
                ),
            },
            options.rounds,
        )
        speedup, size = seen["bitsandbytes"] / seen["lorakit"], f"{shape[0]} x {shape[1]}"
        rows.append([size, *(1e3 * seconds for seconds in seen.values()), speedup])
        targets.append(Target(f"{size}: times bitsandbytes' speed", speedup, 20, at_least=True))
    columns = ["weight", "lorakit, ms", "bitsandbytes, ms", "bnb / ours"]
    finish(options, "bf16 to NF4 with double quantization, medians", columns, rows, targets)


if __name__ == "__main__":
    main()
