"""Inspecting an adapter with lorakit and with gradience (PyPI): agreement, time and memory.

- a trained adapter of SmolLM2 (--adapter; without it, random factors of the same shape), alone and on its base;
- an adapter of Llama-70B's shape, rank 64, from its 3.3 GB file: time and peak memory;
- two adapters on which the two tools differ: rsLoRA's scaling, and singular values far below the largest. A dense SVD
  in float64 decides.

gradience runs in its own environment:

    python -m venv ../gradience && ../gradience/bin/pip install gradience

Run as: python -m bench.inspect [--gradience ../gradience/bin/python] [--adapter FOLDER] [--rounds 3] [--check]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.adapters.make_adapter import make_adapter
from bench.harness.report import NOT_INSTALLED, Target, arguments, finish
from lorakit.adapters.peft.folder import read_adapter_folder
from lorakit.models import Checkpoint, resolve_model

BASE = "smollm2-135m-instruct"
FIGURES = ("norm", "stable_rank", "effective_rank", "rank_for_90")


def measure(python: str, side: str, *words: str) -> dict[str, Any]:
    """Run a side's script in its own process and return its figures."""
    print(f"  {side} {' '.join(words)} ...", file=sys.stderr)
    run = subprocess.run([python, "-m", f"bench.inspect_{side}", *words], capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{side} failed:\n{run.stderr[-4000:]}")
    figures: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return figures


def write(folder: Path, factors: Mapping[str, tuple[Tensor, Tensor]], **config: Any) -> Path:
    """Write path -> (B, A) as an adapter folder."""
    folder.mkdir(parents=True)
    tensors = {}
    for path, (b, a) in factors.items():
        tensors |= {f"base_model.model.{path}.lora_A.weight": a, f"base_model.model.{path}.lora_B.weight": b}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 32} | config))
    return folder


def random_adapter(folder: Path) -> Path:
    """Write an adapter with random values, of rank 16 on all linear layers of SmolLM2."""
    checkpoint = Checkpoint(resolve_model(BASE))
    weights = [name.removesuffix(".weight") for name in checkpoint.names if name.endswith("_proj.weight")]
    torch.manual_seed(0)
    factors = {}
    for path in weights:
        out, into = checkpoint.shape(f"{path}.weight")
        factors[path] = 0.01 * torch.randn(out, 16), torch.randn(16, into) / into**0.5
    return write(folder, factors, r=16)


def graded_adapter(folder: Path) -> Path:
    """Write an adapter with singular values from 1 to 1e-12, in float64."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, 16, dtype=torch.float64)).Q for size in (300, 200))
    return write(folder, {"q_proj": (left * torch.logspace(0, -12, 16, dtype=torch.float64), right.T)}, r=16)


def deviation(found: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """Return the largest relative difference over all figures and layers; singular values relative to the largest."""
    worst = 0.0
    for name, layer in expected.items():
        pairs = [(found[name][figure], layer[figure], abs(layer[figure])) for figure in FIGURES]
        largest = max(layer["singular_values"])
        pairs += [
            (*pair, largest) for pair in zip(found[name]["singular_values"], layer["singular_values"], strict=False)
        ]
        worst = max([worst, *(abs(a - b) / scale for a, b, scale in pairs if scale)])
    return worst


def dense(folder: Path) -> dict[str, list[float]]:
    """Return the singular values of every update, multiplied out, in float64."""
    layers = read_adapter_folder(folder).layers
    return {path: torch.linalg.svdvals(layer.update().dense()).tolist()[: layer.rank] for path, layer in layers.items()}


def worst_value(found: Mapping[str, Any], expected: Mapping[str, list[float]]) -> float:
    """Return the largest error of a singular value, each relative to itself."""
    return max(
        abs(value - right) / right
        for path, values in expected.items()
        for value, right in zip(found[path]["singular_values"], values, strict=True)
    )


def main() -> None:
    """Measure, print, check."""
    parser = arguments(str(__doc__))
    parser.add_argument("--gradience", help="Python interpreter with gradience installed")
    parser.add_argument("--adapter", type=Path, help=f"a trained adapter of {BASE}")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows: list[list[object]] = []
    targets: list[Target] = []
    rounds = ("--rounds", str(options.rounds))

    def both(words: str, folder: Path, *more: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
        ours = measure(sys.executable, "lorakit", str(folder), *more)
        theirs = measure(options.gradience, "gradience", str(folder), *more) if options.gradience else None
        for name, side in (("lorakit", ours), ("gradience", theirs)):
            rows.append([words, name, side and median(side["seconds"]), side and side["peak_mb"], None])
            rows[-1][2] = rows[-1][2] or NOT_INSTALLED
        return ours, theirs

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        adapter = options.adapter or random_adapter(folder / "random")
        ours, theirs = both("SmolLM2, r=16", adapter, *rounds)
        if theirs:
            rows[-1][4] = deviation(theirs["layers"], ours["layers"])
            targets.append(Target("SmolLM2: ours / gradience, time", rows[-2][2] / rows[-1][2], 1.0))  # type: ignore[operator]
            targets.append(Target("SmolLM2: largest relative difference", rows[-1][4], 1e-6))  # type: ignore[arg-type]
        based = measure(sys.executable, "lorakit", str(adapter), "--base", BASE, "--rounds", "1")
        rows.append(["SmolLM2, r=16, on its base", "lorakit", based["seconds"][0], based["peak_mb"], None])
        targets.append(Target("SmolLM2 on its base, seconds", based["seconds"][0], 30))
        make_adapter(folder / "large")
        ours, theirs = both("Llama-70B's shape, r=64", folder / "large", "--rounds", "1")
        targets.append(Target("70B's shape, seconds", ours["seconds"][0], 60))
        targets.append(Target("70B's shape, peak MiB", ours["peak_mb"], 2048))
        if theirs:
            rows[-1][4] = deviation(theirs["layers"], ours["layers"])
            targets.append(
                Target("70B's shape: ours / gradience, time", ours["seconds"][0] / theirs["seconds"][0], 1.0)
            )
            targets.append(Target("70B's shape: largest relative difference", rows[-1][4], 1e-6))  # type: ignore[arg-type]
        torch.manual_seed(1)
        rslora = write(
            folder / "rslora", {"q_proj": (torch.randn(300, 16), torch.randn(16, 200))}, r=16, use_rslora=True
        )
        for words, hard in (("rsLoRA", rslora), ("singular values from 1 to 1e-12", graded_adapter(folder / "graded"))):
            ours, theirs = both(words, hard, "--rounds", "1")
            expected = dense(hard)
            for row, side in ((rows[-2], ours), (rows[-1], theirs)):
                row[4] = side and worst_value(side["layers"], expected)
            targets.append(Target(f"{words}: largest relative error", float(str(rows[-2][4])), 1e-3))
    columns = ["adapter", "side", "seconds", "peak MiB", "largest relative difference"]
    finish(options, "Inspecting adapters; differences to lorakit, below rsLoRA to a dense SVD", columns, rows, targets)


if __name__ == "__main__":
    main()
