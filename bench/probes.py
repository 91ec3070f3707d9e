"""What the probes cost a training step: steps with them and without, in turn, in one process.

    QLoRA of SmolLM2-135M, rank 16 on all linear layers, 2 x 512 tokens in two micro-batches, all trained

Two models of the same start take the same steps, one of them with probes at their defaults, and this stops unless
losses and adapters are equal to the bit. Most steps look at norms and noise; every 25th at spectra and drift too. The
overhead is that of a long run: the median over steps of (seconds with / seconds of the step without beside it), of both
kinds, weighted by how often they come. What is done once a run is a line of its own.

Run as: python -m bench.probes [--model smollm2-135m-instruct] [--steps 12] [--check] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from lorakit import Decoder, LoraConfig, TrainConfig, adapter_parameters, add_adapter, load_model
from lorakit.data import Example
from lorakit.inspection.probes import ProbeConfig, Probes
from lorakit.training import TrainingProbe
from lorakit.training.optimizers import build_optimizer
from lorakit.training.trainer import take_step

from .make_llama import model_folder
from .report import Picture, Target, arguments, finish
from .sides.common import ALPHA, LEARNING_RATE, RANK, random_tokens

BATCH, LENGTH = 2, 512
LIMIT = 0.03
COMMON, ALL = "with", "with spectra and drift"
RARE = ProbeConfig().spectra_every or 1


class Side:
    """A model in training, with probes or without."""

    def __init__(self, folder: Path, probes: Sequence[TrainingProbe], output: Path) -> None:
        self.model: Decoder = load_model(folder, "nf4")
        torch.manual_seed(0)
        add_adapter(self.model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))
        self.config = TrainConfig(lr=LEARNING_RATE, batch_size=BATCH, micro_batch_tokens=LENGTH)
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = build_optimizer(trained, self.config)
        self.examples = [
            Example(row.tolist(), [False] + [True] * (LENGTH - 1), f"random:{number}")
            for number, row in enumerate(random_tokens(self.model.config.vocab_size, BATCH, LENGTH))
        ]
        self.probes = probes
        self.model.train()
        started = time.perf_counter()
        for probe in probes:
            probe.begin(self.model, self.examples, [], output, 0)
        self.once = time.perf_counter() - started

    def step(self, number: int) -> tuple[float, float]:
        """Take a step as the trainer does; return its seconds and loss."""
        started = time.perf_counter()
        for probe in self.probes:
            probe.before_step(number)
        row = take_step(self.model, self.examples, self.optimizer, LEARNING_RATE, self.config, self.probes)
        for probe in self.probes:
            probe.after_step(row)
        return time.perf_counter() - started, row["loss"]


def measure(plain: Side, probed: Side, steps: int) -> dict[str, list[tuple[float, float]]]:
    """Take the steps in turn; return of each kind the pairs of seconds, without probes and with them.

    The probed side counts its steps so that all is looked at in every third: a long run's steps, in a short time.

    Raises:
        AssertionError: losses or adapters differ.
    """
    seconds: dict[str, list[tuple[float, float]]] = {COMMON: [], ALL: []}
    for number in range(steps + 1):
        kind, step = (ALL, RARE) if number % 3 == 0 else (COMMON, 1)
        taken = {side: side.step(step) for side in ((plain, probed) if number % 2 else (probed, plain))}
        assert taken[plain][1] == taken[probed][1], f"step {number}: the losses differ"
        if number:
            seconds[kind].append((taken[plain][0], taken[probed][0]))
    pairs = zip(adapter_parameters(plain.model), adapter_parameters(probed.model), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs), "the adapters differ"
    return seconds


def main() -> None:
    """Measure, print, draw, compare with the target."""
    parser = arguments(str(__doc__), plots=True)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a known model or a checkpoint folder")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each side, after a first one; 3 or more")
    options = parser.parse_args()
    folder = model_folder(options.model)
    with tempfile.TemporaryDirectory() as output:
        plain, probed = Side(folder, [], Path(output)), Side(folder, [Probes()], Path(output))
        pairs = measure(plain, probed, max(3, options.steps))
        size = (Path(output) / "probes.jsonl").stat().st_size / (options.steps + 2)
        for probe in probed.probes:
            probe.end()
    without = median(plain for taken in pairs.values() for plain, _ in taken)
    more = {kind: median(probed / plain for plain, probed in taken) - 1 for kind, taken in pairs.items()}
    overhead = ((RARE - 1) * more[COMMON] + more[ALL]) / RARE
    rows: list[list[object]] = [["without", without, None]]
    rows += [[kind, (1 + share) * without, share] for kind, share in more.items()]
    rows.append([f"with, every {RARE}th with spectra and drift", (1 + overhead) * without, overhead])
    rows.append(["once a run: norms and activations of the base", probed.once, None])
    picture = Picture("ms a step")
    seconds = {"without": without} | {kind: (1 + share) * without for kind, share in more.items()}
    picture.add("training step", seconds, list(seconds), [])
    title = f"{Path(options.model).name}: what probes cost a step; {size / 1024:.0f} KiB of probes.jsonl a step"
    target = Target("probes' share of a step's time", overhead, LIMIT)
    finish(options, title, ["step", "seconds", "overhead"], rows, [target], picture)


if __name__ == "__main__":
    main()
