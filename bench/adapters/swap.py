"""Sixteen adapters on one SmolLM2-135M: switching, and batches whose 16 rows use all of them, beside PEFT.

"One" is the time of the same batch with one adapter for all rows. The passes run in bf16 and without gradients: one
pass over rows of 64 tokens, and 16 passes in sequence over one token a row, as in generation. A step is a forward and
backward pass over rows of 64 tokens. PEFT has its adapters in bf16 too, and does not train by rows.

Run as: python -m bench.swap [--check] [--json FILE] [--plot FILE] [--rounds 5]
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import peers
from bench.harness.plot import Picture
from bench.harness.report import Target, arguments, finish, milliseconds, ratio
from bench.harness.timing import Calls, medians
from lorakit import LoraConfig, add_adapter, load_model, set_adapter, set_trained, use_rows
from lorakit.models import resolve_model
from lorakit.models.decoder.loss import summed_loss

NAMES = [f"adapter{number}" for number in range(16)]
RANK = 16
PASSES = {"pass, 64 tokens a row": (64, 1), "16 passes, 1 token a row": (1, 16)}  # tokens a row, passes
STEP, SWITCH = "step, 64 tokens a row", "switch"
CONTENDERS = ("lorakit", "lorakit, one", "PEFT", "PEFT, one")
MAX_SWITCH_MS = 5.0
MAX_RATIO = 1.5  # of the time with 16 adapters to that with one


def our_calls(folder: Path) -> dict[str, Calls]:
    """Return lorakit's calls: measurement -> contender -> call."""
    model = load_model(folder, quant_type=None, dtype=torch.bfloat16)
    for name in NAMES:
        add_adapter(model, LoraConfig(r=RANK, init_lora_weights=False), name)
    turn = itertools.cycle(NAMES)

    def step(trained: list[str]) -> None:
        ids = batch(64).flatten()
        set_trained(model, trained)
        model.zero_grad()
        summed_loss(model, ids, ids.roll(-1), [64] * len(NAMES)).backward()

    def by_rows(run: Callable[[], None]) -> Callable[[], None]:
        def call() -> None:
            with use_rows(model, NAMES):
                run()

        return call

    def with_one(run: Callable[[], None]) -> Callable[[], None]:
        def call() -> None:
            set_adapter(model, NAMES[0])
            run()

        return call

    result: dict[str, Calls] = {SWITCH: {"lorakit": lambda: set_adapter(model, next(turn))}}
    for what, (length, count) in PASSES.items():
        run = passes(model, batch(length), count)
        result[what] = {"lorakit": by_rows(run), "lorakit, one": with_one(run)}
    steps: Calls = {"lorakit": by_rows(lambda: step(NAMES)), "lorakit, one": with_one(lambda: step(NAMES[:1]))}
    return result | {STEP: steps}


def peft_calls(folder: Path) -> dict[str, Calls]:
    """Return PEFT's calls of the same kinds."""
    peft, transformers = importlib.import_module("peft"), importlib.import_module("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    config = peft.LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
    model: Any = peft.get_peft_model(base, config, adapter_name=NAMES[0], autocast_adapter_dtype=False)
    for name in NAMES[1:]:
        model.add_adapter(name, config, autocast_adapter_dtype=False)
    model.eval()
    turn = itertools.cycle(NAMES)

    def with_one(run: Callable[[], None]) -> Callable[[], None]:
        def call() -> None:
            model.set_adapter(NAMES[0])
            run()

        return call

    result: dict[str, Calls] = {SWITCH: {"PEFT": lambda: model.set_adapter(next(turn))}}
    for what, (length, count) in PASSES.items():
        rows, one = passes(model, batch(length), count, adapter_names=NAMES), passes(model, batch(length), count)
        result[what] = {"PEFT": rows, "PEFT, one": with_one(one)}
    return result


def passes(model: nn.Module, ids: Tensor, count: int, **options: Any) -> Callable[[], None]:
    """Return a call that runs a batch through a model `count` times."""

    @torch.inference_mode()
    def run() -> None:
        for _ in range(count):
            model(ids, **options)

    return run


def batch(length: int) -> Tensor:
    """Return token ids, (16, length)."""
    return torch.randint(0, 49_000, (len(NAMES), length), generator=torch.Generator().manual_seed(length))


def main() -> None:
    """Measure, print, compare with the targets."""
    parser = arguments(str(__doc__), plots=True)
    parser.add_argument("--rounds", type=int, default=5, help="times that each call is measured")
    options = parser.parse_args()
    folder = resolve_model("smollm2-135m-instruct")
    ours = our_calls(folder)
    theirs = peft_calls(folder) if peers.has("peft") and peers.has("transformers") else {}
    rows, targets, picture = [], [], Picture("milliseconds")
    for what, calls in ours.items():
        contenders = calls | theirs.get(what, {})
        seen = medians(contenders, 10 * options.rounds if what == SWITCH else options.rounds)
        times = [milliseconds(seen, name) if name in seen or not theirs else None for name in CONTENDERS]
        of_one = ratio(seen, "lorakit", "lorakit, one")
        rows.append([what, *times, of_one, ratio(seen, "PEFT", "PEFT, one")])
        if of_one is None:
            targets.append(Target("switching among 16 adapters, in ms", 1e3 * seen["lorakit"], MAX_SWITCH_MS))
        else:
            targets.append(Target(f"{what}: time of the same batch with one adapter", of_one, MAX_RATIO))
            picture.add(what, seen, ("lorakit", "PEFT"), ("lorakit, one",))
    columns = ["what", *CONTENDERS, "ours / one", "PEFT's / one"]
    finish(options, "16 adapters on SmolLM2-135M, medians in ms", columns, rows, targets, picture)


if __name__ == "__main__":
    main()
