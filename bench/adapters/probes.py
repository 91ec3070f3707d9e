"""The cost of the probes in a training step: steps with and without them, in turn, in one process.

    QLoRA of SmolLM2-135M, rank 16 on all linear layers, 2 x 512 tokens in two micro-batches, all trained

Two models with the same start take the same steps. One of them has probes with their defaults, and they swap roles
every round. The measurement stops unless losses and adapters are equal to the bit. Each kind of step is measured
separately: one that measures norms only, one with the gradient's noise too, one with spectra, one with drift. The
overhead is that of a long run: for each kind the median of (seconds with probes / seconds of the neighboring step
without), weighted by its share of the steps. Work that is done once a run has its own line.

Run as: python -m bench.probes [--model smollm2-135m-instruct] [--rounds 8] [--check] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from bench.harness.make_llama import model_folder
from bench.harness.plot import Picture
from bench.harness.report import Target, arguments, finish
from bench.training.sides.common import ALPHA, LEARNING_RATE, RANK, random_tokens
from lorakit import Decoder, LoraConfig, TrainConfig, adapter_parameters, add_adapter, load_model
from lorakit.data import Example
from lorakit.inspection.probes import ProbeConfig, Probes
from lorakit.training.optimizers.build import build_optimizer
from lorakit.training.trainer import take_step

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
    """A model in training, with probes that can be switched on."""

    def __init__(self, folder: Path, output: Path) -> None:
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
        self.model.train()
        self.probes = Probes()
        started = time.perf_counter()
        self.probes.begin(self.model, self.examples, [], output, 0)
        self.once = time.perf_counter() - started

    def step(self, number: int, is_probed: bool) -> tuple[float, float]:
        """Take a step as the trainer does; return its seconds and loss."""
        probes = [self.probes] if is_probed else []
        started = time.perf_counter()
        for probe in probes:
            probe.before_step(number)
        row = take_step(self.model, self.examples, self.optimizer, LEARNING_RATE, self.config, probes)
        for probe in probes:
            probe.after_step(row)
        return time.perf_counter() - started, row["loss"]


def measure(sides: Sequence[Side], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Take the steps in turn; return for each kind the pairs of seconds, without probes and with them.

    Raises:
        AssertionError: losses or adapters differ.
    """
    seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for number in range(rounds + 1):
        for kind, step in KINDS.items():
            order = [0, 1] if number // 2 % 2 else [1, 0]
            taken = {side: sides[side].step(step, is_probed=side == number % 2) for side in order}
            assert taken[0][1] == taken[1][1], f"round {number}, {kind}: the losses differ"
            if number:
                seconds[kind].append((taken[1 - number % 2][0], taken[number % 2][0]))
    pairs = zip(*(adapter_parameters(side.model) for side in sides), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs), "the adapters differ"
    return seconds


def main() -> None:
    """Measure, print, draw, compare with the target."""
    parser = arguments(str(__doc__), plots=True)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a known model or a checkpoint folder")
    parser.add_argument(
        "--rounds", type=int, default=8, help="timed steps of each kind on each side, after a first; by four"
    )
    options = parser.parse_args()
    folder = model_folder(options.model)
    with tempfile.TemporaryDirectory() as output:
        sides = [Side(folder, Path(output) / name) for name in "ab"]
        pairs = measure(sides, options.rounds)
        for side in sides:
            side.probes.end()
    without = median(plain for taken in pairs.values() for plain, _ in taken)
    more = {kind: median(probed / plain for plain, probed in taken) - 1 for kind, taken in pairs.items()}
    overhead = sum(SHARES[kind] * share for kind, share in more.items())
    rows: list[list[object]] = [["without", None, without, None]]
    rows += [[kind, SHARES[kind], (1 + share) * without, share] for kind, share in more.items()]
    rows.append(["a long run", 1.0, (1 + overhead) * without, overhead])
    rows.append(["once a run: the base's norms and activations", None, sides[0].once, None])
    picture = Picture("ms a step")
    seconds = {"without": without} | {kind: (1 + share) * without for kind, share in more.items()}
    picture.add("training step", seconds, list(seconds), [])
    title = f"{Path(options.model).name}: what probes cost a step"
    target = Target("probes' share of a step's time", overhead, LIMIT)
    finish(options, title, ["step", "share of steps", "seconds", "overhead"], rows, [target], picture)


if __name__ == "__main__":
    main()
