"""Memory of training on the CPU, measured in one way for three questions: its parts, its growth, and its prediction.

    python -m bench.memory     parts of a process's peak, by configuration: lorakit, PEFT
    python -m bench.scaling    growth of training memory with the length and with the vocabulary: lorakit, PEFT
    python -m bench.plan       predicted peaks beside measured ones, by configuration: lorakit

A separate process for each row loads the model and takes steps. The first command splits the peak resident size of
SmolLM2-135M's training into the imports, the model with its adapter, and the rest, which training adds. PEFT has the
settings that need the least memory (sdpa attention, adapter in bf16), without and with gradient checkpointing.

Run as: python -m bench.memory [--model smollm2-135m-instruct] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness.make_llama import LLAMA_7B, SMOLLM2, make_llama, model_folder
from bench.harness.plot import canvas
from bench.harness.processes import CHECKPOINTING, Figures, Side, step_seconds
from bench.harness.report import Target, arguments, finish
from bench.training.sides.common import ALPHA, RANK
from lorakit import LoraConfig, Plan, TrainConfig, plan
from lorakit.models import DecoderConfig
from lorakit.planning import measure_runtime

LEAN_PEFT = ("--gradient-checkpointing",)
RAGGED_STEPS = 100  # of a ragged configuration: memory that grows with the number of shapes would show


@dataclass(frozen=True)
class Step:
    """The training step of a process.

    Attributes:
        batch, length: sequences, and tokens of each.
        quant_type: quantization of the weights; None: bf16.
        settings: settings of our TrainConfig, as "name=value".
        dora: whether our adapter is a DoRA adapter.
        ragged: whether later steps draw the length of each sequence anew, so that each has its own number of tokens.
    """

    batch: int
    length: int
    quant_type: str | None = "nf4"
    settings: tuple[str, ...] = ()
    dora: bool = False
    ragged: bool = False

    def __str__(self) -> str:
        settings = (
            "".join(f", {setting}" for setting in self.settings)
            + ", DoRA" * self.dora
            + f", ragged, {RAGGED_STEPS} steps" * self.ragged
        )
        return f"{self.quant_type or 'bf16'}, {self.batch} x {self.length}{settings}"

    def ours(self, name: str, model: Path, steps: int = 1) -> Side:
        """Return lorakit's process on a checkpoint folder, with `steps` after the first one."""
        settings = (word for setting in self.settings for word in ("--set", setting))
        options = (*self._common(model, steps), *settings, *("--dora",) * self.dora)
        return Side(name, "bench.sides.lorakit_step", options)

    def peft(self, name: str, model: Path, *options: str) -> Side:
        """Return PEFT's process, with options of its script."""
        return Side(name, "bench.sides.peft_step", (*self._common(model, 1), *options))

    def _common(self, model: Path, steps: int) -> tuple[str, ...]:
        common = ("--model", str(model), "--quant-type", self.quant_type or "none", "--batch", str(self.batch))
        if self.ragged:
            common, steps = (*common, "--ragged"), RAGGED_STEPS - 1
        return (*common, "--length", str(self.length), "--steps", str(steps))


# ---- parts of a peak -------------------------------------------------------------------------------------------------

CONFIGURATIONS = {
    "QLoRA, 1 x 512": Step(1, 512),
    "QLoRA, 2 x 512": Step(2, 512),
    "QLoRA, 1 x 2048": Step(1, 2048),
    "LoRA bf16, 2 x 512": Step(2, 512, None),
    f"QLoRA, 8 x 64 to 128, {RAGGED_STEPS} steps": Step(8, 128, ragged=True),
}
OURS = {"lorakit": (), "lorakit, adamw_8bit": ("optimizer=adamw_8bit",), "lorakit, checkpointing": CHECKPOINTING}
PEERS = {"PEFT": (), "PEFT, checkpointing": LEAN_PEFT}
PARTS = ("imports", "model", "training")


def sides(model: Path) -> dict[Side, tuple[str, str]]:
    """Return the sides to run -> (configuration, who)."""
    found = {}
    for name, step in CONFIGURATIONS.items():
        for who, settings in OURS.items():
            ours = replace(step, settings=settings)
            found[ours.ours(f"{name}: {who}", model)] = (name, who)
        for who, options in PEERS.items():
            found[step.peft(f"{name}: {who}", model, *options)] = (name, who)
    return found


def parts(figures: Figures) -> dict[str, float]:
    """Return the parts of a process's peak, in GiB."""
    imports, loaded, peak = (figures[key] / 1024 for key in ("imports_mb", "loaded_mb", "peak_mb"))
    return dict(zip(PARTS, (imports, loaded - imports, peak - loaded), strict=True))


def by_configuration() -> None:
    """Measure, print, draw the parts of peaks."""
    parser = arguments(str(__doc__), plots=True)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a known model or a checkpoint folder")
    options = parser.parse_args()
    named = sides(model_folder(options.model).resolve())
    seen = {side: side.measure() for side in named}
    stacks = {named[side]: parts(figures) for side, figures in seen.items()}
    rows = [
        [*named[side], sum(stacks[named[side]].values()), *stacks[named[side]].values(), step_seconds([figures])]
        for side, figures in seen.items()
    ]
    columns = ["configuration", "who", "peak GiB", *(f"{part} GiB" for part in PARTS), "s a step"]
    if options.plot:
        draw_parts(stacks, options.plot)
    finish(options, f"{Path(options.model).name}: peak memory of training", columns, rows)


def draw_parts(stacks: Mapping[tuple[str, str], Mapping[str, float]], file: Path) -> None:
    """Draw one stacked bar for each (configuration, who)."""
    places, labels, place, last = [], [], 0.0, ""
    for name, who in stacks:
        place += 1 if name == last else 1.6
        places.append(place)
        labels.append(f"{name}: {who}" if name != last else who)
        last = name
    with canvas(file, 8.4, 1.2 + 0.24 * len(stacks)) as figure:
        axes = figure.add_subplot()
        left = [0.0] * len(stacks)
        for part, color in zip(PARTS, ("#bbbbbb", "#56B4E9", "#0072B2"), strict=True):
            widths = [stack[part] for stack in stacks.values()]
            axes.barh(places, widths, left=left, color=color, label=part, height=0.8)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        for end, place in zip(left, places, strict=True):
            axes.annotate(
                f"{end:.2f}", (end, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7
            )
        axes.set_yticks(places, labels, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("peak resident memory, GiB")
        figure.legend(loc="outside upper center", ncols=len(PARTS), frameon=False, fontsize=8)


# ---- growth ----------------------------------------------------------------------------------------------------------

LAYERS = 10
LENGTHS = (512, 1024, 2048, 4096, 8192)
VOCABULARIES = (32_768, 65_536, 131_072, 262_144)
VOCABULARY_LENGTH = 1024  # tokens when the vocabulary varies
MAX_RESIDUAL = 0.05  # from a straight line, as a share of the memory at the longest sequence
MAX_GROWTH = 1.1  # from the smallest vocabulary's memory to the largest one's

Points = dict[str, dict[int, float]]  # side -> size -> training memory in MiB


def pair(folder: Path, config: Mapping[str, Any], length: int) -> dict[str, Side]:
    """Return both sides on a model of this shape, which is written into the folder if it is not there yet."""
    model = folder / f"vocabulary-{config['vocab_size']}"
    if not model.exists():
        make_llama(model, config)
    step = Step(1, length, settings=CHECKPOINTING)
    what = f"{length} tokens, vocabulary {config['vocab_size']}"
    return {"lorakit": step.ours(f"{what}: lorakit", model), "PEFT": step.peft(f"{what}: PEFT", model, *LEAN_PEFT)}


def training_mb(figures: Figures) -> float:
    """Return the peak of the steps in MiB, above the resident size before them."""
    return float(figures["training_peak_mb"] - figures["loaded_mb"])


def residual(points: Mapping[int, float]) -> float:
    """Return the largest distance from the straight line of least squares, as a share of the largest value."""
    sizes, values = np.array(list(points)), np.array(list(points.values()))
    line = np.polynomial.Polynomial.fit(sizes, values, 1)
    return float(np.abs(line(sizes) - values).max() / values.max())


def growth(points: Mapping[int, float]) -> float:
    """Return the value at the largest size as a multiple of that at the smallest."""
    return points[max(points)] / points[min(points)]


def by_size(description: str) -> None:
    """Measure, print, draw the growth of memory, compare with the targets."""
    parser = arguments(description, plots=True)
    parser.add_argument("--longest", type=int, default=max(LENGTHS), help="leave longer sequences out")
    options = parser.parse_args()
    lengths = [length for length in LENGTHS if length <= options.longest]
    with tempfile.TemporaryDirectory() as folder:
        rows, panels = measure_sizes(Path(folder), SMOLLM2 | {"num_hidden_layers": LAYERS}, lengths, VOCABULARIES)
    if options.plot:
        draw_growth(panels, options.plot)
    by_length, by_vocabulary = panels.values()
    checks = [
        Target("memory by length, distance from a straight line", residual(by_length["lorakit"]), MAX_RESIDUAL),
        Target("memory by vocabulary, largest / smallest", growth(by_vocabulary["lorakit"]), MAX_GROWTH),
    ]
    columns = ["tokens", "vocabulary", "who", "training GiB", "loaded GiB"]
    title = f"{LAYERS} layers, NF4, {', '.join(CHECKPOINTING)}; PEFT with gradient checkpointing"
    finish(options, title, columns, rows, checks)


def measure_sizes(
    folder: Path, config: Mapping[str, Any], lengths: Sequence[int], vocabularies: Sequence[int]
) -> tuple[list[list[object]], dict[str, Points]]:
    """Measure all sizes; return the table's rows, and the points of each panel."""
    sizes = [(length, config["vocab_size"], "tokens", length) for length in lengths]
    sizes += [(VOCABULARY_LENGTH, size, "vocabulary", size) for size in vocabularies]
    rows: list[list[object]] = []
    panels: dict[str, Points] = {"tokens": {}, "vocabulary": {}}
    for length, vocabulary, panel, size in sizes:
        for who, side in pair(folder, {**config, "vocab_size": vocabulary}, length).items():
            figures = side.measure()
            memory = training_mb(figures)
            panels[panel].setdefault(who, {})[size] = memory
            rows.append([length, vocabulary, who, memory / 1024, figures["loaded_mb"] / 1024])
    return rows, panels


def draw_growth(panels: Mapping[str, Points], file: Path) -> None:
    """Draw one panel for each of the two sizes that vary."""
    looks = {"lorakit": ("#0072B2", "o", "-"), "PEFT": ("#E69F00", "s", "--")}
    with canvas(file, 8.4, 3.4) as figure:
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
            axes.legend(fontsize=8)


# ---- beside the plan -------------------------------------------------------------------------------------------------

MOST_OFF = 0.07
WIDE = LLAMA_7B | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "num_attention_heads": 32}
GROUPED = WIDE | {
    "vocab_size": 128256, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 10,
    "num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip
SMOL = "smollm2-135m"
SHAPES = {SMOL: SMOLLM2, "4 x 2048": WIDE, "10 x 1024, 128k": GROUPED}
MLP, SECOND, SMALL_STATE = ("checkpointing=mlp",), ("checkpointing=2",), ("optimizer=adamw_8bit",)
PLANNED = (
    (SMOL, Step(2, 512)),
    (SMOL, Step(2, 512, settings=CHECKPOINTING)),
    (SMOL, Step(1, 2048, settings=MLP)),
    (SMOL, Step(4, 256, None, SMALL_STATE)),
    (SMOL, Step(8, 128, settings=("micro_batch_tokens=512", *SECOND))),
    ("4 x 2048", Step(1, 512, settings=SMALL_STATE)),
    ("4 x 2048", Step(2, 512)),
    ("4 x 2048", Step(4, 512, settings=CHECKPOINTING)),
    ("4 x 2048", Step(1, 1024, None, MLP)),
    ("10 x 1024, 128k", Step(2, 384)),
    ("10 x 1024, 128k", Step(4, 256, settings=(*SECOND, *SMALL_STATE))),
    ("10 x 1024, 128k", Step(4, 512, settings=("micro_batch_tokens=512", *CHECKPOINTING))),
    # The constants of lorakit/planning/runtime.py were not fitted to these:
    (SMOL, Step(1, 1024, settings=("checkpointing=3",))),
    (SMOL, Step(3, 640, None, MLP)),
    ("4 x 2048", Step(1, 1536, settings=MLP)),
    ("10 x 1024, 128k", Step(1, 1024, None, ("optimizer=lion",))),
    (SMOL, Step(2, 512, dora=True)),
    (SMOL, Step(2, 512, settings=("lora_fa=true",))),
)
RAGGED = (
    (SMOL, Step(8, 128, ragged=True)),
    (SMOL, Step(4, 256, None, CHECKPOINTING, ragged=True)),
    ("10 x 1024, 128k", Step(4, 128, ragged=True)),
)


def predicted(shape: str, step: Step, runtime_bytes: int | None) -> Plan:
    """Return the plan of a step."""
    given: dict[str, Any] = {"batch_size": step.batch, "micro_batch_tokens": step.batch * step.length}
    given |= dict(setting.split("=", 1) for setting in step.settings)
    return plan(
        DecoderConfig.from_dict(SHAPES[shape]), LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=step.dora),
        TrainConfig(**given), quant_type=step.quant_type, sequence_length=step.length, runtime_bytes=runtime_bytes,
    )  # fmt: skip


def beside_plan(description: str) -> None:
    """Make the checkpoints, measure, compare."""
    parser = arguments(description)
    parser.add_argument("--folder", type=Path, help="folder of the checkpoints, which are written if missing")
    parser.add_argument("--constant", action="store_true", help="predict with the library's constant for the runtime")
    parser.add_argument(
        "--ragged", action="store_true", help=f"{RAGGED_STEPS} ragged steps each, of three configurations"
    )
    parser.add_argument("--only", default="", help="only configurations whose name contains this")
    options = parser.parse_args()
    runtime = None if options.constant else measure_runtime()
    with tempfile.TemporaryDirectory() as temporary:
        rows = [
            compared(shape, step, options.folder or Path(temporary), runtime)
            for shape, step in (RAGGED if options.ragged else PLANNED)
            if options.only in f"{shape}: {step}"
        ]
    columns = ["shape", "configuration", "measured MiB", "predicted MiB", "off by %"]
    columns += ["runtime", "weights", "adapter", "activations", "workspace", "allocator"]
    worst = max((abs(row[3] / row[2] - 1) for row in rows), default=0.0)
    targets = [Target("largest deviation of a predicted peak", worst, MOST_OFF)]
    title = f"Peak memory of training on the CPU, rank {RANK}: predicted and measured, MiB"
    finish(options, title, columns, rows, targets)


def compared(shape: str, step: Step, folder: Path, runtime_bytes: int | None) -> tuple[Any, ...]:
    """Measure a step; return its row."""
    model = folder / shape.replace(" ", "")
    if not (model / "config.json").exists():
        model.mkdir(parents=True, exist_ok=True)
        make_llama(model, SHAPES[shape])
    made = predicted(shape, step, runtime_bytes)
    seen = float(step.ours(f"{shape}: {step}", model, steps=2).measure()["peak_mb"])
    mib = {name: size / 2**20 for name, size in made.parts.items()}
    total = made.peak_bytes / 2**20
    return (
        shape, str(step), seen, total, 100 * (total / seen - 1), mib["runtime"], mib["weights"],
        mib["adapters"] + mib["gradients"] + mib["optimizer"], mib["activations"], mib["workspace"] + mib["logits"],
        mib["allocator"],
    )  # fmt: skip


if __name__ == "__main__":
    by_configuration()
