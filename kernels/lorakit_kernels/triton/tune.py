"""Measure for each shape which tile is fastest on this GPU, or whether dequantizing first is, and keep the answers.

The library reads the file when it next starts (see `tiles.tuned_file`). Delete the file to return to the defaults. The
authors had no GPU and never ran this on one; the code around the timing is tested in Triton's interpreter.

Run as: python -m lorakit_kernels.triton.tune [--shapes 4096x4096,14336x4096] [--tokens 1,128,512,2048]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor

from ..operands import Weight4bit
from .linear_4bit import linear_4bit, linear_4bit_dx
from .tiles import CANDIDATES, family, key, tuned, tuned_file

_BLOCK = 64


def tune(
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    device: torch.device,
    measure: Callable[[Callable[[], Tensor]], float],
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Measure each operation, shape and candidate, and return the file that holds the fastest.

    Args:
        shapes: (out_features, in_features) of each weight.
        tokens: numbers of tokens, each standing for its power of 2.
        device: the device to measure on.
        measure: returns the time that a call takes, in any unit.
        dtype: dtype of the tensors that the weight is multiplied by.
    """
    table = tuned(device)
    for rows, columns in shapes:
        for count in tokens:
            for operation, run in _operations(rows, columns, count, device, dtype).items():
                shape = key(operation, count, rows, columns)
                times = {}
                for tile in (*CANDIDATES[family(operation, count)], None):
                    table.pop(shape, None)
                    table[shape] = tile  # the operation looks it up
                    times[tile] = measure(run)
                table[shape] = min(times, key=lambda tile: times[tile])
                print(f"{shape}: {table[shape] or 'dequantize, then multiply'}", flush=True)
    file = tuned_file(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"triton": triton.__version__, "tiles": table}, indent=1) + "\n", encoding="utf-8")
    return file


def _operations(
    rows: int, columns: int, tokens: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], Tensor]]:
    """Return name -> call for the products with a random weight with fp32 scales."""
    weight = Weight4bit(
        torch.randint(256, (rows * columns // 2,), dtype=torch.uint8, device=device),
        torch.linspace(-1, 1, 16, device=device),
        torch.rand(-(-rows * columns // _BLOCK), device=device),
        _BLOCK,
        (rows, columns),
    )
    x = torch.randn(tokens, columns, dtype=dtype, device=device)
    dy = torch.randn(tokens, rows, dtype=dtype, device=device)
    return {"linear_4bit": partial(linear_4bit, x, weight), "linear_4bit_dx": partial(linear_4bit_dx, dy, weight)}


def main() -> None:
    """Tune on the current GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,14336x4096,4096x14336", help="weights, OUTxIN features each")
    parser.add_argument("--tokens", default="1,32,64,128,256,512,1024,2048", help="numbers of tokens")
    options = parser.parse_args()
    device = torch.accelerator.current_accelerator()
    if device is None:
        raise SystemExit("tuning needs a GPU, and PyTorch finds none")
    shapes = [(int(rows), int(columns)) for rows, columns in (text.split("x") for text in options.shapes.split(","))]
    tokens = [int(text) for text in options.tokens.split(",")]
    print(f"kept in {tune(shapes, tokens, torch.device(device.type, 0), triton.testing.do_bench)}")


if __name__ == "__main__":
    main()
