"""One QLoRA step of 512 tokens on a model with the shape of Llama-7B: does it fit in 6 GiB, and what bounds its time?

The checkpoint has random bf16 weights (13.5 GB, written into the cache once, or in --folder) and is quantized while it
is loaded. Peak memory is the process's peak resident size, including Python, PyTorch and loading. "products alone" is
the time of the products with the frozen weights, one after the other in dense bf16 in the same process: forward, once
more for recomputed activations, and backward to the input.

Run as: python -m bench.step_7b [--check] [--json FILE] [--folder DIR] [--length 512] [--steps 1]
"""

from __future__ import annotations

from pathlib import Path

from bench.harness.make_llama import model_folder
from bench.harness.processes import CHECKPOINTING, Figures, Side, step_seconds
from bench.harness.report import Target, arguments, finish

MAX_PEAK_GIB = 6.0
PASSES = 2 if CHECKPOINTING else 1  # forward


def side(folder: Path, length: int, steps: int) -> Side:
    """Return the script to run."""
    settings = tuple(part for setting in CHECKPOINTING for part in ("--set", setting))
    given = ("--model", str(folder), "--batch", "1", "--length", str(length), "--steps", str(steps))
    return Side("lorakit", "bench.sides.lorakit_step", (*given, "--products", str(PASSES), *settings))


def row(figures: Figures) -> list[object]:
    """Return the table's row."""
    seconds, alone = step_seconds([figures]), figures["products"]
    peaks = [figures[key] / 1024 for key in ("loading_peak_mb", "loaded_mb", "training_peak_mb")]
    return [seconds, alone, seconds / alone, *peaks, figures["losses"][0]]


def main() -> None:
    """Measure, print, compare with the target."""
    parser = arguments(str(__doc__))
    parser.add_argument("--folder", type=Path, help="a checkpoint of this shape (see bench.make_llama)")
    parser.add_argument("--length", type=int, default=512, help="tokens of the sequence")
    parser.add_argument("--steps", type=int, default=1, help="timed steps, after a first one")
    options = parser.parse_args()
    folder = options.folder or model_folder("llama-7b")
    figures = side(folder.resolve(), options.length, options.steps).measure()
    columns = [
        "s a step", "products alone, s", "step / products", "loading peak GiB", "loaded GiB", "training peak GiB",
        "first loss",
    ]  # fmt: skip
    targets = [Target("peak memory, GiB", figures["peak_mb"] / 1024, MAX_PEAK_GIB)]
    title = f"{folder.name}, NF4, 1 x {options.length} tokens, {', '.join(CHECKPOINTING) or 'no checkpointing'}"
    finish(options, title, columns, [row(figures)], targets)


if __name__ == "__main__":
    main()
