"""Loading a Llama-7B-shaped checkpoint (13.5 GB of bf16) in NF4: peak memory, and time beside that of reading it.

Each figure comes from its own process. One reads all tensors with the reader that loading uses and drops them, the
other is `load_model(folder)`. They alternate, from a warm page cache and from a cold one (the files are dropped from it
before the process starts). Peak memory is the process's VmHWM, Python and PyTorch (about 0.3 GiB) included. Time is
that of the call, without imports.

The target for the time holds for files on the disk. The page cache delivers them at the speed of a memory copy, and
loading takes six times the processor time of that: two cores load in three times the time of reading, more cores in
less. Loading needs all processors, so measure on an otherwise idle machine.

Run as: python -m bench.load_7b [--check] [--json FILE] [--folder DIR] [--keep] [--runs 3] [--layers 32]
The checkpoint is written to DIR (default: a temporary folder) or used if it exists. If this command wrote it, it is
removed at the end, unless DIR was given with --keep.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import lorakit_kernels as kernels
import torch

from bench.harness.make_llama import LLAMA_7B, make_llama, nbytes
from bench.harness.report import Target, arguments, finish
from lorakit import load_model, quantize
from lorakit.checkpoints.stream import map_bands
from lorakit.measure import peak_rss_mb
from lorakit.models import Checkpoint

MAX_PEAK_GIB = 5.0
MAX_RATIO = 1.5
CACHES = ("warm", "cold")


def shape(layers: int) -> dict[str, Any]:
    """Return the config of a Llama-7B with this number of layers."""
    return LLAMA_7B | {"num_hidden_layers": layers}


def measure(task: str, folder: Path) -> dict[str, float]:
    """Read or load in this process; return seconds, processor seconds and peak memory in MiB."""
    quantize(torch.randn(64, 64))  # kernels are compiled on first use
    start, start_cpu = time.perf_counter(), time.process_time()
    if task == "load":
        load_model(folder)
    else:
        checkpoint = Checkpoint(folder)
        for _ in map_bands(checkpoint, checkpoint.names, lambda band, values: None):
            pass
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    return {"seconds": seconds, "cpu": cpu, "peak_mb": peak_rss_mb()}


def measure_apart(task: str, folder: Path, cold: bool) -> dict[str, float]:
    """Measure in a separate process."""
    if cold:
        for file in folder.glob("*.safetensors"):
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
    command = [sys.executable, "-m", "bench.load_7b", "--measure", task, "--folder", str(folder)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, float] = json.loads(output)
    return figures


def run(options: argparse.Namespace, folder: Path) -> None:
    """Measure all, print the table."""
    size = nbytes(shape(options.layers))
    seen: dict[tuple[str, str], list[dict[str, float]]] = {}
    measure_apart("read", folder, cold=False)  # warms the cache
    for _ in range(options.runs):
        for cache in CACHES:  # the cold runs end with a warm cache
            for task in ("read", "load"):
                seen.setdefault((task, cache), []).append(measure_apart(task, folder, cache == "cold"))
    rows: list[tuple[object, ...]] = []
    peak = max(figures["peak_mb"] for (task, _), runs in seen.items() if task == "load" for figures in runs) / 1024
    targets = [Target("peak memory of loading, GiB", peak, MAX_PEAK_GIB)]
    for cache in CACHES:
        read, load = (median(figures["seconds"] for figures in seen[task, cache]) for task in ("read", "load"))
        for task, seconds in (("read", read), ("load + NF4", load)):
            runs = seen[task.split()[0], cache]
            cpu, peaks = median(r["cpu"] for r in runs), max(r["peak_mb"] for r in runs) / 1024
            rows.append((cache, task, seconds, cpu, size / seconds / 1e9, peaks, seconds / read))
        if cache == "cold":
            targets.append(Target("time of loading / reading, from disk", load / read, MAX_RATIO))
    columns = ("page cache", "what", "seconds (median)", "processor s", "GB/s", "peak GiB", "of reading")
    backend = kernels.dispatch.backend(torch.device("cpu")).__name__.rpartition(".")[2]
    title = f"{options.layers} layers, {size / 1e9:.2f} GB in bf16, {options.runs} runs, backend {backend}"
    finish(options, title, columns, rows, targets)


def main() -> None:
    """Make the checkpoint, measure, remove it."""
    parser = arguments(str(__doc__))
    parser.add_argument("--folder", type=Path, help="folder of the checkpoint, which is written if missing")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint in --folder")
    parser.add_argument("--runs", type=int, default=3, help="runs of each kind")
    parser.add_argument("--layers", type=int, default=LLAMA_7B["num_hidden_layers"], help="number of layers")
    parser.add_argument("--measure", choices=("read", "load"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder)))
        return
    folder = options.folder or Path(tempfile.mkdtemp(prefix="llama-7b-"))
    folder.mkdir(parents=True, exist_ok=True)
    made = not (folder / "config.json").exists()
    busy = os.getloadavg()[0]
    if busy > 0.5:
        print(f"note: the machine is busy (load average {busy:.1f}), so the ratio will be too high", file=sys.stderr)
    try:
        if made:
            needed, free = nbytes(shape(options.layers)), shutil.disk_usage(folder).free
            if free < needed * 1.05:
                sys.exit(
                    f"{folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} are free; name another --folder"
                )
            start = time.perf_counter()
            make_llama(folder, shape(options.layers))
            print(f"made {folder} in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        run(options, folder)
    finally:
        if made and not (options.keep and options.folder):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
