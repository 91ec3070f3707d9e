"""What the probes cost a training step: steps with them and without, in turn, in one process.

    QLoRA of SmolLM2-135M, rank 16 on all linear layers, 2 x 512 tokens in two micro-batches, all trained

Two models of the same start take the same steps, one of them with probes at their defaults, and this stops unless
losses and adapters are equal to the bit. Each kind of step is measured by itself: one that looks at norms alone, one
that looks at the gradient's noise too, one at spectra, one at drift. The overhead is that of a long run: of each kind,
the median of (seconds with / seconds of the step without beside it), weighted by how often it comes. What is done once
a run is a line of its own.

Run as: python -m bench.probes [--model smollm2-135m-instruct] [--rounds 5] [--check] [--json FILE] [--plot FILE]
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
DEFAULTS = ProbeConfig()
EVERY = (1, DEFAULTS.noise_every or 1, DEFAULTS.spectra_every or 1, DEFAULTS.drift_every or 1)  # each divides the next
KINDS = dict(zip(("norms", "and noise", "and spectra", "and drift"), EVERY, strict=True))
SHARES = {  # of a long run's steps
    kind: 1 / every - (1 / following if following else 0)
    for (kind, every), following in zip(KINDS.items(), (*EVERY[1:], None), strict=True)
}


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


def measure(plain: Side, probed: Side, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Take the steps in turn; return of each kind the pairs of seconds, without probes and with them.

    Raises:
        AssertionError: losses or adapters differ.
    """
    seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for number in range(rounds + 1):
        for kind, step in KINDS.items():
            taken = {side: side.step(step) for side in ((plain, probed) if number % 2 else (probed, plain))}
            assert taken[plain][1] == taken[probed][1], f"round {number}, {kind}: the losses differ"
            if number:
                seconds[kind].append((taken[plain][0], taken[probed][0]))
    pairs = zip(adapter_parameters(plain.model), adapter_parameters(probed.model), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs), "the adapters differ"
    return seconds


def main() -> None:
    """Measure, print, draw, compare with the target."""
    parser = arguments(str(__doc__), plots=True)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a known model or a checkpoint folder")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each kind on each side, after a first")
    options = parser.parse_args()
    folder = model_folder(options.model)
    with tempfile.TemporaryDirectory() as output:
        plain, probed = Side(folder, [], Path(output)), Side(folder, [Probes()], Path(output))
        pairs = measure(plain, probed, options.rounds)
        for probe in probed.probes:
            probe.end()
    without = median(plain for taken in pairs.values() for plain, _ in taken)
    more = {kind: median(probed / plain for plain, probed in taken) - 1 for kind, taken in pairs.items()}
    overhead = sum(SHARES[kind] * share for kind, share in more.items())
    rows: list[list[object]] = [["without", None, without, None]]
    rows += [[kind, SHARES[kind], (1 + share) * without, share] for kind, share in more.items()]
    rows.append(["a long run", 1.0, (1 + overhead) * without, overhead])
    rows.append(["once a run: the base's norms and activations", None, probed.once, None])
    picture = Picture("ms a step")
    seconds = {"without": without} | {kind: (1 + share) * without for kind, share in more.items()}
    picture.add("training step", seconds, list(seconds), [])
    title = f"{Path(options.model).name}: what probes cost a step"
    target = Target("probes' share of a step's time", overhead, LIMIT)
    finish(options, title, ["step", "share of steps", "seconds", "overhead"], rows, [target], picture)


if __name__ == "__main__":
    main()
