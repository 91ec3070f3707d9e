"""Memory of a process besides tensors, and the speed of its matrix products: measured, not derived."""

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
# A CUDA context with the kernels of PyTorch and its libraries: an assumption, since no GPU was measured.
GPU_RUNTIME = 500 << 20
# glibc serves tensors below 32 MiB from a heap, where a tensor cannot use a gap smaller than itself. The heap outgrows
# its content by a constant plus a multiple of the largest tensor served from it. Both were fitted to the first twelve
# configurations of bench/training/plan.py; the others were not part of the fit.
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
    """Return the resident bytes of a process that trains a tiny model; the measurement takes about five seconds.

    Raises:
        ConfigError: this system has no /proc/self/status, where Linux reports them.
    """
    if not Path("/proc/self/status").exists():
        raise ConfigError("resident memory can be measured only on Linux; give runtime_bytes")
    run = subprocess.run([sys.executable, "-c", _TRAIN_TINY], check=True, capture_output=True, text=True)
    return int(run.stdout) << 10


@cache
def measure_flops(dtype: torch.dtype, size: int = 1024, seconds: float = 0.5) -> float:
    """Return the FLOPs a second of the CPU's matrix products, the best of all that run within `seconds`."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    out = a @ b
    best, end = float("inf"), time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
