"""The Triton kernels on this computer's GPU (CUDA, ROCm, XPU): first their correctness, then their speed.

Every kernel is compared with its definition in plain PyTorch on the same inputs: the codec and the optimizer bit for
bit, the others within the bound of rounding. Then Triton's `do_bench` times it (device events, the cache cleared before
each call, medians). It also times PyTorch's own operation on dense bf16 tensors (for the codec, the definition), and
bitsandbytes and torchao if they are installed. A size is the weight's, (out, in), and the number of tokens. The limit
is the time to move the necessary bytes through memory, at the speed of a copy measured first. Training a layer has no
such limit, because its products bound it.

The authors have measured no GPU and claim nothing about speed.

Run as: python -m bench.gpu [--json FILE] [--markdown FILE] [--plot FILE] [--check]
To try it without a GPU: python -m bench.gpu --device cpu --small (with TRITON_INTERPRET=1 LORAKIT_BACKEND=triton
before it, for the Triton kernels); those times mean nothing.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import torch

from bench.gpu import gpu_cases, gpu_training_cases
from bench.gpu.gpu_cases import Call, Case, Setting
from bench.harness import peers
from bench.harness.plot import Picture
from bench.harness.report import NOT_INSTALLED, Target, arguments, finish, markdown
from bench.harness.timing import medians

RIVALS = ("lorakit", "PyTorch", "bitsandbytes", "torchao")
COLUMNS = ["operation", "size", "error / bound", *RIVALS, "limit", "PyTorch / ours"]
NO_GPU = "bench.gpu needs a GPU that PyTorch can use (CUDA, ROCm or XPU), and torch.accelerator finds none."


def main() -> None:
    """Check, measure, print."""
    parser = arguments(str(__doc__), plots=True)
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--device", help="device, instead of the current GPU")
    parser.add_argument("--small", action="store_true", help="small shapes, nothing compiled by the peers")
    options = parser.parse_args()
    device = torch.device(options.device) if options.device else current_gpu()
    setting = Setting(device)
    if options.small:
        # Triton's interpreter cuts bf16 off where a GPU rounds.
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        setting = Setting.small(device, torch.float16 if interpreted else torch.bfloat16)
        torch.compiler.set_stance("force_eager")
    torch.manual_seed(0)
    clock = clock_of(device)
    byte = time_of_a_byte(setting, clock)
    rows, wrong, picture = [], 0, Picture("milliseconds")
    for case in chain(gpu_cases.cases(setting), gpu_training_cases.cases(setting)):
        print(f"{case.operation}, {case.size}", file=sys.stderr, flush=True)
        verdict, is_right = checked(case)
        wrong += not is_right
        seen = dict(measured(case, clock))
        limit = byte * case.bytes_moved if case.bytes_moved else None
        ours, pytorch = seen["lorakit"], seen["PyTorch"]
        of_pytorch = pytorch / ours if isinstance(ours, float) and isinstance(pytorch, float) else None
        rows.append([case.operation, case.size, verdict, *seen.values(), limit, of_pytorch])
        group = f"{case.operation}\n{case.size}"
        picture.bars[group] = {name: value for name, value in seen.items() if isinstance(value, float)}
        picture.marks[group] = {} if limit is None else {"limit": limit}
    title = f"Kernels on {device}, medians in ms" + (": small shapes, times mean nothing" if options.small else "")
    if options.markdown:
        options.markdown.write_text(markdown(COLUMNS, rows), encoding="utf-8")
    targets = [Target("kernels that disagree with their definitions", wrong, 0)]
    finish(options, title, COLUMNS, rows, targets, picture, device=device)


def current_gpu() -> torch.device:
    """Return the GPU to measure, or say that there is none and exit with status 2."""
    device = torch.accelerator.current_accelerator()
    if device is None:
        print(NO_GPU, file=sys.stderr)
        sys.exit(2)
    return device


def checked(case: Case) -> tuple[str, bool]:
    """Return in words the difference of a kernel from its definition, and whether it is within the bound."""
    try:
        error = case.check()
    except Exception as failure:  # an unknown GPU may fail anywhere; the rest of the table is still useful
        return f"FAILED: {_name(failure)}", False
    if case.exact:
        return ("bit-equal", True) if error == 0 else (f"WRONG: {error:g} elements differ", False)
    is_right = error <= 1 and not math.isnan(error)
    return f"{'' if is_right else 'WRONG: '}{error:.2g}", is_right


def measured(case: Case, clock: Callable[[Call], float]) -> Iterator[tuple[str, float | str | None]]:
    """Yield the milliseconds of each rival, or the reason for none, or None if it has no such operation."""
    for name in RIVALS:
        if name not in case.rivals:
            yield name, None
        elif name in ("bitsandbytes", "torchao") and not peers.has(name):
            yield name, NOT_INSTALLED
        else:
            try:
                yield name, clock(case.rivals[name]())
            except Exception as failure:  # too little memory, or a peer that cannot use this GPU
                yield name, f"failed: {_name(failure)}"


def clock_of(device: torch.device) -> Callable[[Call], float]:
    """Return a function that times a call in ms: by device events, or on a CPU by the wall clock."""
    if device.type == "cpu":
        return lambda call: 1e3 * medians({"call": call}, rounds=2)["call"]
    do_bench = importlib.import_module("triton.testing").do_bench
    return lambda call: float(do_bench(call, return_mode="median"))


def time_of_a_byte(setting: Setting, clock: Callable[[Call], float]) -> float:
    """Return the ms per byte of a copy of the largest weight."""
    source = setting.random(*setting.weights[-1])
    target = torch.empty_like(source)
    return clock(lambda: target.copy_(source)) / (2 * source.nbytes)


def _name(failure: Exception) -> str:
    return type(failure).__name__


if __name__ == "__main__":
    main()
