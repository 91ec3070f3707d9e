"""Fine-tuning SmolLM2-135M on addresses as JSON, lorakit next to TRL + PEFT + bitsandbytes: speed, memory, outcome.

The data are JSON Lines of {"text": ..., "fields": {...}}. The model learns to answer the text with its fields as one
JSON object, in one epoch of QLoRA in batches of 8. Only the answer is trained. For each seed both sides train

- on the same tokens: each side encodes the conversations with its own library, and the measurement stops unless the
  hashes of all token ids and of the trained ones are equal;
- from the same adapter, in the same order, at the same learning rate (a cosine without warm-up), clipped alike.

`bench.sides.held_out` computes the held-out loss of both sides' saved adapters on one 4-bit base.

Each run is a separate process. TRL's settings are first tried for a few steps each. The fastest then runs with every
seed, taking turns with lorakit. The leanest runs once, for its peak memory over a whole epoch. Ordering the data to
save padding (group_by_length) is not among the settings, because it would train on other batches.

Run as: python -m bench.sft --data us_addresses.jsonl [--records 128] [--held-out 64] [--seeds 3] [--lr 5e-4]
                            [--check] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from bench.harness.make_llama import model_folder
from bench.harness.processes import CHECKPOINTING, Figures, Side, interpreter_mb, step_seconds
from bench.harness.report import Target, arguments, finish
from lorakit import Record, save_records
from lorakit.data import Message, batch_order

BATCH = 8
TRIAL_STEPS = 2
SETTINGS = {  # TRL's
    "defaults": (),
    "no autocast": ("--no-autocast",),
    "no checkpointing": ("--no-checkpointing",),
    "no checkpointing, no autocast": ("--no-checkpointing", "--no-autocast"),
    "no checkpointing, no autocast, eager": ("--no-checkpointing", "--no-autocast", "--attention", "eager"),
}
SPEEDUP, MEMORY = 3.0, 0.4
HELD_OUT = 1.005  # losses within half a percent are equal: rounding to bf16 alone changes as much in so short a run
LOSS_TOLERANCE = 0.02  # relative difference of the sides' first losses


@dataclass(frozen=True)
class Files:
    """The files that the scripts read and write, in one folder."""

    folder: Path
    model: str
    lr: float

    def ours(self, seed: int) -> Side:
        """Return lorakit's run; it also writes the start for TRL's run."""
        return Side(f"lorakit, seed {seed}", "bench.sides.lorakit_sft", self._given("train.jsonl", "ours", seed))

    def ours_lean(self, seed: int) -> Side:
        """Return lorakit's run with the settings that need the least memory."""
        given = self._given("train.jsonl", "ours-lean", seed)
        settings = tuple(part for setting in CHECKPOINTING for part in ("--set", setting))
        return Side(f"lorakit, checkpointing, seed {seed}", "bench.sides.lorakit_sft", (*given, *settings))

    def peer(self, seed: int, setting: str, steps: int = -1) -> Side:
        """Return TRL's run of a setting."""
        name = setting.replace(", ", "-").replace(" ", "-") if steps < 0 else "trial"
        given = self._given(f"train-{seed}.jsonl", name, seed)
        more = (*SETTINGS[setting], "--max-steps", str(steps))
        return Side(f"TRL, {setting}, seed {seed}", "bench.sides.trl_sft", (*given, *more))

    def adapter(self, side: Side) -> str:
        """Return the folder that a run writes its adapter to."""
        return side.arguments[side.arguments.index("--adapter") + 1]

    def _given(self, records: str, name: str, seed: int) -> tuple[str, ...]:
        paths = {
            "--model": self.model, "--records": self.folder / records, "--start": self.folder / f"start-{seed}",
            "--adapter": self.folder / f"{name}-{seed}", "--lr": self.lr, "--seed": seed, "--batch": BATCH,
        }  # fmt: skip
        return tuple(str(part) for pair in paths.items() for part in pair)


def read_addresses(path: Path) -> list[Record]:
    """Return one conversation for each different text, in a fixed random order."""
    rows = {row["text"]: row["fields"] for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    records = [
        Record((Message("user", text), Message("assistant", json.dumps(fields, ensure_ascii=False))), f"{path.name}")
        for text, fields in rows.items()
    ]
    random.Random(0).shuffle(records)
    return records


def add_data_options(parser: argparse.ArgumentParser, records: int) -> None:
    """Add the options of the training and held-out records; `records` is the default number to train on."""
    parser.add_argument("--data", type=_existing, required=True, help='JSON Lines of {"text": ..., "fields": {...}}')
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--records", type=int, default=records, help="records to train on")
    parser.add_argument("--held-out", type=int, default=64, help="records for the held-out loss")


def chosen_records(options: argparse.Namespace) -> tuple[list[Record], list[Record]]:
    """Return the training and the held-out records; exit if the data has too few."""
    records = read_addresses(options.data)
    if len(records) < options.records + options.held_out:
        sys.exit(f"{options.data} has {len(records)} different texts; needed: --records + --held-out")
    return records[: options.records], records[options.records :][: options.held_out]


def _existing(path: str) -> Path:
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {path}")
    return Path(path)


def write_files(files: Files, train: Sequence[Record], held_out: Sequence[Record], seeds: int) -> None:
    """Write the records for our side, which shuffles them itself, and for TRL's in the same order."""
    save_records(files.folder / "train.jsonl", train)
    save_records(files.folder / "held-out.jsonl", held_out)
    for seed in range(seeds):
        order = [index for batch in batch_order(len(train), BATCH, seed, 0) for index in batch]
        save_records(files.folder / f"train-{seed}.jsonl", [train[index] for index in order])


def measure(files: Files, seeds: int) -> dict[Side, Figures]:
    """Run all sides; return the figures of the complete runs."""
    seen = {files.ours(0): files.ours(0).measure()}
    trials = {setting: files.peer(0, setting, TRIAL_STEPS).measure() for setting in SETTINGS}
    fastest = min(trials, key=lambda setting: step_seconds([trials[setting]]))
    leanest = min(trials, key=lambda setting: trials[setting]["peak_mb"])
    for seed in range(seeds):
        for side in (files.ours(seed), files.peer(seed, fastest)):
            if side not in seen:
                seen[side] = side.measure()
    lean = [files.peer(0, leanest)] + ([files.ours_lean(0)] if CHECKPOINTING else [])
    return seen | {side: side.measure() for side in lean if side not in seen}


def check_alike(seen: dict[Side, Figures]) -> None:
    """Raise AssertionError if the sides did not train on the same tokens, or did not start from the same loss."""
    if len({figures["digest"] for figures in seen.values()}) > 1:
        raise AssertionError("the sides' tokens or trained tokens differ")
    for seed in {side.name.rpartition(" ")[2] for side in seen}:
        losses = {side.name: run["losses"][0] for side, run in seen.items() if side.name.endswith(f"seed {seed}")}
        if max(losses.values()) - min(losses.values()) > LOSS_TOLERANCE * min(losses.values()):
            raise AssertionError(f"the first losses differ: {losses}")


def held_out_losses(files: Files, sides: Sequence[Side]) -> dict[Side, float]:
    """Return the held-out loss of each run's adapter."""
    adapters = [part for side in sides for part in ("--adapter", files.adapter(side))]
    given = ("--model", files.model, "--records", str(files.folder / "held-out.jsonl"), *adapters)
    losses = Side("held-out losses", "bench.sides.held_out", given).measure()
    return {side: losses[files.adapter(side)] for side in sides}


def pairs(seen: dict[Side, Figures]) -> tuple[list[Side], list[Side]]:
    """Return our runs without checkpointing and those of TRL's fastest setting, one a seed."""
    ours = [side for side in seen if is_ours(side) and "--set" not in side.arguments]
    theirs = [side for side in seen if not is_ours(side)]
    return ours, theirs[: len(ours)]


def is_ours(side: Side) -> bool:
    """Return whether a run is lorakit's."""
    return side.module == "bench.sides.lorakit_sft"


def targets(seen: dict[Side, Figures], losses: dict[Side, float], interpreter: float) -> list[Target]:
    """Return the targets of the comparison."""
    ours, fast = pairs(seen)
    speedup = median(rate(seen[mine]) / rate(seen[theirs]) for mine, theirs in zip(ours, fast, strict=True))
    least, their_least = (
        min(figures["peak_mb"] for side, figures in seen.items() if is_ours(side) == whose) - interpreter
        for whose in (True, False)
    )
    loss = mean(losses[side] for side in ours) / mean(losses[side] for side in fast)
    return [
        Target("samples a second, ours / TRL's fastest, median of all seeds", speedup, SPEEDUP, at_least=True),
        Target("peak memory, our leanest / TRL's leanest", least / their_least, MEMORY),
        Target("held-out loss, ours / that of TRL's fastest, mean of all seeds", loss, HELD_OUT),
    ]


def rate(figures: Figures) -> float:
    """Return the samples a second of a run."""
    return float(figures["samples"] / figures["seconds"][0])


def main() -> None:
    """Measure, print, compare with the targets."""
    parser = arguments(str(__doc__))
    add_data_options(parser, records=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=5e-4)
    options = parser.parse_args()
    train, held_out = chosen_records(options)
    with tempfile.TemporaryDirectory() as folder:
        run(options, train, held_out, Files(Path(folder), str(model_folder(options.model).resolve()), options.lr))


def run(options: argparse.Namespace, train: Sequence[Record], held_out: Sequence[Record], files: Files) -> None:
    """Measure all, print the table."""
    interpreter = interpreter_mb()
    write_files(files, train, held_out, options.seeds)
    seen = measure(files, options.seeds)
    check_alike(seen)
    losses = held_out_losses(files, [side for half in pairs(seen) for side in half])
    rows = [
        [
            side.name, rate(figures), (figures["peak_mb"] - interpreter) / 1024, figures["imports_mb"] / 1024,
            figures["losses"][0], figures["losses"][-1],
            losses.get(side, "-"),
        ]
        for side, figures in seen.items()
    ]  # fmt: skip
    columns = ["run", "samples/s", "peak GiB", "imports GiB", "first loss", "last loss", "held-out loss"]
    title = f"{options.records} records, {options.held_out} held out, batch {BATCH}, learning rate {options.lr:g}"
    finish(options, title, columns, rows, targets(seen, losses, interpreter))


if __name__ == "__main__":
    main()
