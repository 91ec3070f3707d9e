"""Shared parts of both sides' scripts: options, tokens, and records of time and memory.

This module does not import lorakit, because the peers' processes would carry it. Peak memory is the process's VmHWM. It
is recorded separately for loading and for training, with a reset in between. The resident size after the imports is
recorded too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

RANK, ALPHA, LEARNING_RATE = 16, 32, 2e-4
GRAD_NORM = 1.0  # limit of the global norm on both sides


def step_arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of a script that takes training steps."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument(
        "--quant-type", choices=("nf4", "none"), default="nf4", help="quantization of the frozen weights"
    )
    parser.add_argument("--batch", type=int, default=2, help="sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens of each; all except the first are trained")
    parser.add_argument("--dropout", type=float, default=0.0, help="lora_dropout of the adapter")
    parser.add_argument("--ragged", action="store_true", help="after the first step, draw each sequence's length anew")
    parser.add_argument("--steps", type=int, default=3, help="steps to time, after a first one that is not counted")
    return parser


def sft_arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of a script that trains on conversations."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--records", type=Path, required=True, help="conversations, one JSON object a line")
    parser.add_argument("--start", type=Path, required=True, help="folder of the adapter before training")
    parser.add_argument("--adapter", type=Path, required=True, help="folder to save the trained adapter to")
    parser.add_argument("--batch", type=int, default=8, help="conversations a step")
    parser.add_argument("--max-length", type=int, default=1024, help="longest conversation in tokens")
    parser.add_argument("--lr", type=float, default=LEARNING_RATE)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def random_tokens(vocabulary: int, batch: int, length: int) -> Tensor:
    """Return token ids, (batch, length), the same for both sides."""
    return torch.randint(vocabulary, (batch, length), generator=_generator(0))


def lengths(options: argparse.Namespace, step: int) -> list[int]:
    """Return the tokens of each sequence at a step: all of them, or a half to all in a ragged step after the first."""
    if not options.ragged or step == 0:
        return [options.length] * options.batch
    drawn = torch.randint(options.length // 2, options.length + 1, (options.batch,), generator=_generator(step))
    return drawn.tolist()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def digest(examples: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> str:
    """Return a hash of the examples (token ids, whether each is trained), independent of their order."""
    lines = sorted(json.dumps([list(ids), [bool(is_trained) for is_trained in trained]]) for ids, trained in examples)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def memory_mb(which: Literal["VmRSS", "VmHWM"]) -> float:
    """Return the process's resident memory, now (VmRSS) or at its peak (VmHWM), in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{which}:")[1].split()[0]) / 1024


class Meter:
    """Records a process's memory and time, stage by stage; create it after the imports.

    Attributes:
        figures: imports_mb and threads; loading_peak_mb and loaded_mb; training_peak_mb and peak_mb (of both peaks).
    """

    def __init__(self) -> None:
        self.figures: dict[str, Any] = {"imports_mb": memory_mb("VmRSS"), "threads": torch.get_num_threads()}

    def loaded(self) -> None:
        """Record that the model is ready to train, and reset the peak."""
        self.figures |= {"loaded_mb": memory_mb("VmRSS"), "loading_peak_mb": memory_mb("VmHWM")}
        Path("/proc/self/clear_refs").write_text("5")

    def trained(self) -> None:
        """Record that training is done."""
        peak = memory_mb("VmHWM")
        self.figures |= {"training_peak_mb": peak, "peak_mb": max(peak, self.figures["loading_peak_mb"])}

    def take_steps(self, step: Callable[[int], float], count: int) -> None:
        """Take step 0 and `count` more; record all losses and seconds, the first step's seconds separately.

        The first step allocates the optimizer's state and sets up the kernels, or compiles.
        """
        losses, seconds = [], []
        for number in range(1 + count):
            started = time.perf_counter()
            losses.append(step(number))
            seconds.append(time.perf_counter() - started)
        self.trained()
        self.figures |= {"losses": losses, "seconds": seconds[1:], "first_seconds": seconds[0]}

    def print(self, **more: Any) -> None:
        """Print all figures, and `more`, as one line of JSON."""
        print(json.dumps(self.figures | more))
