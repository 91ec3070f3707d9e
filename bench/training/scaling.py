"""How training memory grows with the length of the sequence and with the vocabulary: lorakit, and PEFT + bitsandbytes.

The model has SmolLM2-135M's width with 10 layers and random weights, in NF4; its own vocabulary where the length
varies, and 1,024 tokens where the vocabulary does. Each size is a process of its own that takes two steps. Training
memory is the peak of the steps above what was resident before the first: the weights are left out, for a table of
embeddings grows with the vocabulary whoever trains. PEFT has gradient checkpointing, sdpa attention and the adapter in
bf16, the settings that need the least.

Ours must be a straight line in the length, and the same for all vocabularies.

Run as: python -m bench.scaling [--longest 8192] [--check] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness.make_llama import SMOLLM2, make_llama
from bench.harness.processes import CHECKPOINTING, Figures, Side
from bench.harness.report import Target, arguments, finish

LAYERS = 10
LENGTHS = (512, 1024, 2048, 4096, 8192)
VOCABULARIES = (32_768, 65_536, 131_072, 262_144)
VOCABULARY_LENGTH = 1024  # tokens where the vocabulary varies
MAX_RESIDUAL = 0.05  # from a straight line, as a share of the memory at the longest sequence
MAX_GROWTH = 1.1  # from the smallest vocabulary's memory to the largest one's

Points = dict[str, dict[int, float]]  # side -> size -> training memory in MiB


def sides(folder: Path, config: Mapping[str, Any], length: int) -> dict[str, Side]:
    """Return both sides on a model of this shape, which is written into the folder where it is not there yet."""
    model = folder / f"vocabulary-{config['vocab_size']}"
    if not model.exists():
        make_llama(model, config)
    given = ("--model", str(model), "--batch", "1", "--length", str(length), "--steps", "1")
    recompute = tuple(part for setting in CHECKPOINTING for part in ("--set", setting))
    what = f"{length} tokens, vocabulary {config['vocab_size']}"
    return {
        "lorakit": Side(f"{what}: lorakit", "bench.sides.lorakit_step", (*given, *recompute)),
        "PEFT": Side(f"{what}: PEFT", "bench.sides.peft_step", (*given, "--gradient-checkpointing")),
    }


def training_mb(figures: Figures) -> float:
    """Return what the steps take above what was resident before them."""
    return float(figures["training_peak_mb"] - figures["loaded_mb"])


def residual(points: Mapping[int, float]) -> float:
    """Return the largest distance from the straight line of least squares, as a share of the largest value."""
    sizes, values = np.array(list(points)), np.array(list(points.values()))
    line = np.polynomial.Polynomial.fit(sizes, values, 1)
    return float(np.abs(line(sizes) - values).max() / values.max())


def growth(points: Mapping[int, float]) -> float:
    """Return the value at the largest size as a multiple of that at the smallest."""
    return points[max(points)] / points[min(points)]


def draw(panels: Mapping[str, Points], file: Path) -> None:
    """Draw one panel for each of the two sizes that vary."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    looks = {"lorakit": ("#0072B2", "o", "-"), "PEFT": ("#E69F00", "s", "--")}
    for axes, (what, points) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for who, values in points.items():
            color, marker, dashes = looks[who]
            gib = [value / 1024 for value in values.values()]
            axes.plot(list(values), gib, color=color, marker=marker, linestyle=dashes, label=who)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel(what)
        axes.set_ylabel("training memory, GiB")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=144)


def main() -> None:
    """Measure, print, draw, compare with the targets."""
    parser = arguments(str(__doc__))
    parser.add_argument("--plot", type=Path, help="draw the figures: a .png or .svg file")
    parser.add_argument("--longest", type=int, default=max(LENGTHS), help="leave longer sequences out")
    options = parser.parse_args()
    lengths = [length for length in LENGTHS if length <= options.longest]
    with tempfile.TemporaryDirectory() as folder:
        rows, panels = run(Path(folder), SMOLLM2 | {"num_hidden_layers": LAYERS}, lengths, VOCABULARIES)
    if options.plot:
        draw(panels, options.plot)
    by_length, by_vocabulary = panels.values()
    checks = [
        Target("memory by length, distance from a straight line", residual(by_length["lorakit"]), MAX_RESIDUAL),
        Target("memory by vocabulary, largest / smallest", growth(by_vocabulary["lorakit"]), MAX_GROWTH),
    ]
    columns = ["tokens", "vocabulary", "who", "training GiB", "loaded GiB"]
    title = f"{LAYERS} layers, NF4, {', '.join(CHECKPOINTING) or 'no checkpointing'}; PEFT with gradient checkpointing"
    finish(options, title, columns, rows, checks)


def run(
    folder: Path, config: Mapping[str, Any], lengths: Sequence[int], vocabularies: Sequence[int]
) -> tuple[list[list[object]], dict[str, Points]]:
    """Measure all sizes; return the table's rows, and the points of each panel."""
    sizes = [(length, config["vocab_size"], "tokens", length) for length in lengths]
    sizes += [(VOCABULARY_LENGTH, size, "vocabulary", size) for size in vocabularies]
    rows: list[list[object]] = []
    panels: dict[str, Points] = {"tokens": {}, "vocabulary": {}}
    for length, vocabulary, panel, size in sizes:
        pair = sides(folder, {**config, "vocab_size": vocabulary}, length)
        for who, side in pair.items():
            figures = side.measure()
            memory = training_mb(figures)
            panels[panel].setdefault(who, {})[size] = memory
            rows.append([length, vocabulary, who, memory / 1024, figures["loaded_mb"] / 1024])
    return rows, panels


if __name__ == "__main__":
    main()
