"""RMSNorm, rotary embedding, SwiGLU and dropout on the CPU: C++ beside the definition in plain PyTorch.

Run as: python -m bench.elementwise [--json FILE] [--rounds 40] [--dtype bfloat16]
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from lorakit_kernels import cpu, reference

from bench.harness.report import arguments, finish
from bench.harness.timing import medians

Case = tuple[str, str, tuple[Any, ...]]  # operation, shape, arguments


def cases(dtype: torch.dtype) -> Iterator[Case]:
    """Yield the operations for 1,024 tokens of SmolLM2-135M and of models with hidden size 2,048, and for one token."""
    for tokens, size in ((1024, 576), (1024, 2048), (1, 576)):
        x, dy = torch.randn(2, tokens, size).to(dtype)
        weight, rstd = torch.randn(size).to(dtype), torch.rand(tokens, 1)
        yield "rms_norm", f"{tokens} x {size}", (x, weight, 1e-5)
        yield "rms_norm_backward", f"{tokens} x {size}", (dy, x, weight, rstd)
    for tokens, size in ((1024, 1536), (1024, 8192), (1, 1536)):
        dy, gate, up = torch.randn(3, tokens, size).to(dtype)
        yield "swiglu", f"{tokens} x {size}", (gate, up)
        yield "swiglu_backward", f"{tokens} x {size}", (dy, gate, up)
        yield "drop", f"{tokens} x {size}", (gate, torch.tensor(0), 0.05)
    for tokens in (1024, 1):
        q, k = (torch.randn(tokens, heads, 64).to(dtype) for heads in (9, 3))
        yield "rope", f"{tokens} x (9 + 3) x 64", (q, k, *torch.randn(2, tokens, 64).to(dtype))


def main() -> None:
    """Measure and print."""
    parser = arguments(str(__doc__))
    parser.add_argument("--rounds", type=int, default=40, help="rounds of each call")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32")
    options = parser.parse_args()
    rows = []
    for operation, shape, given in cases(getattr(torch, options.dtype)):
        seen = medians(
            {
                "C++": partial(getattr(cpu, operation), *given),
                "definition": partial(getattr(reference, operation), *given),
            },
            options.rounds,
        )
        rows.append([operation, shape, *(1e3 * seconds for seconds in seen.values()), seen["definition"] / seen["C++"]])
    columns = ["operation", "shape", "C++, ms", "definition, ms", "definition / C++"]
    finish(options, f"{options.dtype}, medians", columns, rows)


if __name__ == "__main__":
    main()
