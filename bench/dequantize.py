"""Dequantizing NF4 to bf16, blocks of 64, double quantization included: lorakit, bitsandbytes, and a plain copy.

lorakit is measured as its layers use it, `QuantizedWeight.dequantize(out=buffer)` with a reused buffer, and with a
fresh result. bitsandbytes offers no buffer on the CPU, so its result is always fresh; a plain copy of the bf16 matrix
between two buffers is what memory allows.

Run as: python -m bench.dequantize [--check] [--json FILE] [--rounds 15]      (LORAKIT_CPU_ISA=avx2 for that path)
"""

from __future__ import annotations

import os

import torch
from bitsandbytes import functional as bnb

from lorakit import quantize

from .report import Target, arguments, finish
from .timing import SHAPES, medians


def main() -> None:
    """Measure, print, compare with the targets."""
    parser = arguments(str(__doc__))
    parser.add_argument("--rounds", type=int, default=15, help="times that each call is measured")
    options = parser.parse_args()
    is_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512" and "LORAKIT_CPU_ISA" not in os.environ
    rows, targets = [], []
    for shape in SHAPES:
        weight = torch.randn(shape).bfloat16()
        ours, out = quantize(weight), torch.empty_like(weight)
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        seen = medians(
            {
                "reused buffer": lambda ours=ours, out=out: ours.dequantize(out=out),
                "fresh": ours.dequantize,
                "bitsandbytes": lambda packed=packed, state=state: bnb.dequantize_4bit(packed, state),
                "copy": lambda weight=weight, out=out: out.copy_(weight),
            },
            options.rounds,
        )
        speedup, of_copy = seen["bitsandbytes"] / seen["reused buffer"], seen["reused buffer"] / seen["copy"]
        size = f"{shape[0]} x {shape[1]}"
        rows.append([size, *(1e3 * seconds for seconds in seen.values()), speedup, of_copy])
        targets.append(Target(f"{size}: times bitsandbytes' speed", speedup, 8 if is_avx512 else 3, at_least=True))
        if is_avx512:
            targets.append(Target(f"{size}: time of a copy", of_copy, 1.2))
    columns = ["weight", "reused buffer, ms", "fresh, ms", "bitsandbytes, ms", "copy, ms", "bnb / ours", "ours / copy"]
    finish(options, "NF4 with double quantization to bf16, medians", columns, rows, targets)


if __name__ == "__main__":
    main()
