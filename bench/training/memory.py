"""Peak memory of training SmolLM2-135M by configuration: lorakit, and PEFT + bitsandbytes + transformers.

Each row is a process of its own that loads the model and takes two steps. Its peak resident size is given in parts:
what the imports take, what the model with its adapter adds, and what training adds at its worst. PEFT has the settings
that need the least (sdpa attention, adapter in bf16), without gradient checkpointing and with it.

Run as: python -m bench.memory [--model smollm2-135m-instruct] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bench.harness.make_llama import model_folder
from bench.harness.processes import CHECKPOINTING, Figures, Side, step_seconds
from bench.harness.report import arguments, finish

CONFIGURATIONS = {  # name -> 4-bit type of the weights, sequences, tokens of each
    "QLoRA, 1 x 512": ("nf4", 1, 512),
    "QLoRA, 2 x 512": ("nf4", 2, 512),
    "QLoRA, 1 x 2048": ("nf4", 1, 2048),
    "LoRA bf16, 2 x 512": ("none", 2, 512),
}
OURS = {"lorakit": (), "lorakit, adamw_8bit": ("optimizer=adamw_8bit",)}
if CHECKPOINTING:
    OURS["lorakit, checkpointing"] = CHECKPOINTING
PEERS = {"PEFT": (), "PEFT, checkpointing": ("--gradient-checkpointing",)}
PARTS = ("imports", "model", "training")


def sides(folder: str) -> dict[Side, tuple[str, str]]:
    """Return what to run -> (configuration, who)."""
    found = {}
    for name, (quant_type, batch, length) in CONFIGURATIONS.items():
        given = ("--model", folder, "--quant-type", quant_type, "--batch", str(batch), "--length", str(length))
        for who, settings in OURS.items():
            options = tuple(part for setting in settings for part in ("--set", setting))
            side = Side(f"{name}: {who}", "bench.sides.lorakit_step", (*given, "--steps", "1", *options))
            found[side] = (name, who)
        for who, options in PEERS.items():
            side = Side(f"{name}: {who}", "bench.sides.peft_step", (*given, "--steps", "1", *options))
            found[side] = (name, who)
    return found


def parts(figures: Figures) -> dict[str, float]:
    """Return what a process's peak is made of, in GiB."""
    imports, loaded, peak = (figures[key] / 1024 for key in ("imports_mb", "loaded_mb", "peak_mb"))
    return dict(zip(PARTS, (imports, loaded - imports, peak - loaded), strict=True))


def draw(stacks: Mapping[tuple[str, str], Mapping[str, float]], file: Path) -> None:
    """Draw one stacked bar for each (configuration, who)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 1.2 + 0.24 * len(stacks)), layout="constrained")
    axes = figure.add_subplot()
    places, labels, place, last = [], [], 0.0, ""
    for name, who in stacks:
        place += 1 if name == last else 1.6
        places.append(place)
        labels.append(f"{name}: {who}" if name != last else who)
        last = name
    left = [0.0] * len(stacks)
    for part, color in zip(PARTS, ("#bbbbbb", "#56B4E9", "#0072B2"), strict=True):
        widths = [stack[part] for stack in stacks.values()]
        axes.barh(places, widths, left=left, color=color, label=part, height=0.8)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for end, place in zip(left, places, strict=True):
        axes.annotate(f"{end:.2f}", (end, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(places, labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("peak resident memory, GiB")
    figure.legend(loc="outside upper center", ncols=len(PARTS), frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=144)


def main() -> None:
    """Measure, print, draw."""
    parser = arguments(str(__doc__))
    parser.add_argument("--plot", type=Path, help="draw the figures: a .png or .svg file")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a known model or a checkpoint folder")
    options = parser.parse_args()
    named = sides(str(model_folder(options.model).resolve()))
    seen = {side: side.measure() for side in named}
    stacks = {named[side]: parts(figures) for side, figures in seen.items()}
    rows = [
        [*named[side], sum(stacks[named[side]].values()), *stacks[named[side]].values(), step_seconds([figures])]
        for side, figures in seen.items()
    ]
    columns = ["configuration", "who", "peak GiB", *(f"{part} GiB" for part in PARTS), "s a step"]
    if options.plot:
        draw(stacks, options.plot)
    finish(options, f"{Path(options.model).name}: peak memory of training", columns, rows)


if __name__ == "__main__":
    main()
