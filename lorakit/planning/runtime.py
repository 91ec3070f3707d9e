"""What a process takes besides tensors, and how fast it multiplies: measured, not derived."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import torch

from ..errors import ConfigError

# Python, PyTorch, lorakit, and the kernels that oneDNN generates for the shapes of a step: VmRSS of `measure_runtime`,
# with torch 2.13 for the CPU on Linux.
CPU_RUNTIME = 304 << 20
# A CUDA context with the kernels of PyTorch and its libraries: an assumption, no GPU was measured.
GPU_RUNTIME = 500 << 20
# glibc serves tensors below 32 MiB from a heap, in which a gap is of no use to a tensor larger than it. By so much the
# heap outgrows what is in it: a constant, and a multiple of the largest tensor that is served from it. Both were fitted
# to the twelve configurations of bench/training/plan.py; its further ones were not part of the fit.
CPU_HEAP_GAPS = 50 << 20
CPU_HEAP_LARGEST = 5
CPU_HEAP_LIMIT = 32 << 20

_TRAIN_TINY = """
import torch
from lorakit import LoraConfig, TrainConfig, add_adapter
from lorakit.models import Decoder, DecoderConfig
from lorakit.models.decoder.loss import summed_loss
from lorakit.training.optimizers.build import build_optimizer
model = Decoder(DecoderConfig("LlamaForCausalLM", 512, 64, 128, 2, 4, 4, 16, 512)).bfloat16()
add_adapter(model, LoraConfig())
optimizer = build_optimizer({n: p for n, p in model.named_parameters() if p.requires_grad}, TrainConfig())
for length in (64, 128, 64):
    ids = torch.arange(length)
    summed_loss(model.train(), ids, ids, [length]).backward()
    optimizer.step()
print(open("/proc/self/status").read().split("VmRSS:")[1].split()[0])
"""


@cache
def measure_runtime() -> int:
    """Return the resident bytes of a process that trains next to nothing; it takes some five seconds.

    Raises:
        ConfigError: this system has no /proc, where Linux tells them.
    """
    if not Path("/proc/self/status").exists():
        raise ConfigError("resident memory can be measured on Linux alone; give runtime_bytes")
    run = subprocess.run([sys.executable, "-c", _TRAIN_TINY], check=True, capture_output=True, text=True)
    return int(run.stdout) << 10


@cache
def measure_flops(dtype: torch.dtype, size: int = 1024, seconds: float = 0.5) -> float:
    """Return the FLOPs a second of the CPU's matrix products, the best of those that `seconds` have room for."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    out = a @ b
    best, end = float("inf"), time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
