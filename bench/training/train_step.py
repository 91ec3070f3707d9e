"""A training step of lorakit next to PEFT + bitsandbytes + transformers: tokens a second and peak memory.

    smollm2-135m-instruct   the real model in bf16, 2 x 512 tokens; also transformers' full fine-tuning step
    llama-1b                the shape and vocabulary of Llama-3.2-1B, random weights, 1 x 1,024 tokens

All linear layers have rank 16, every token except the first of a sequence is trained, the optimizer is AdamW, and
gradients are clipped. QLoRA has NF4 weights with double quantization, LoRA has bf16 weights. Both sides get the same
tokens and must report the same first loss.

A separate process for each figure loads the model, takes a step that is not counted and then --steps counted steps. The
first round runs every setting of the peers. In the other rounds lorakit and the peers' fastest setting take turns.
Seconds are medians over all counted steps of all rounds. The targets of speed compare with the peers' fastest setting.
Those of memory compare with their leanest setting without gradient checkpointing and, for lorakit with checkpointing,
with their setting with it.

Peak memory is the process's peak resident size minus that of a bare Python interpreter (about 10 MiB). Imports count:
training needs them. "imports" and "loaded" are the resident sizes after the imports and before the first step.

Run as: python -m bench.train_step [--model llama-1b] [--rounds 2] [--steps 3] [--dropout 0.05] [--check] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.harness.make_llama import model_folder
from bench.harness.processes import CHECKPOINTING, Figures, Side, alternate, interpreter_mb, middle, step_seconds
from bench.harness.report import Target, arguments, finish

SETTINGS = {  # the peers'
    "sdpa, adapter bf16": (),
    "sdpa, adapter fp32": ("--adapter-dtype", "float32"),
    "eager, adapter bf16": ("--attention", "eager"),
}
CHECKPOINTED = "sdpa, adapter bf16, checkpointing"
LOSS_TOLERANCE = 0.01  # relative difference of the sides' first losses: both round to bf16, in different places


@dataclass(frozen=True)
class Size:
    """The size of a model's step, and its targets.

    Attributes:
        batch, length: sequences, and tokens of each.
        full: whether transformers' full fine-tuning is measured too.
        settings: the peers' settings to try.
        qlora_of_lora: limit of our QLoRA step's time as a multiple of our LoRA step's.
    """

    batch: int
    length: int
    full: bool
    settings: Sequence[str]
    qlora_of_lora: float | None = None


SIZES = {
    "smollm2-135m-instruct": Size(2, 512, True, tuple(SETTINGS)),
    "llama-1b": Size(1, 1024, False, ("sdpa, adapter bf16", "eager, adapter bf16"), qlora_of_lora=1.10),
}
SPEEDUP, MEMORY, OVER_FULL = 2.0, 0.5, 1.4

Seen = dict[Side, list[Figures]]


@dataclass(frozen=True)
class Case:
    """One kind of training: ours, and the peers' settings of it."""

    name: str
    ours: Side | None
    ours_lean: Side | None
    peers: tuple[Side, ...]
    peer_lean: Side | None

    @property
    def sides(self) -> list[Side]:
        """All sides, ours first."""
        return [side for side in (self.ours, self.ours_lean, *self.peers, self.peer_lean) if side is not None]


def cases(folder: str, size: Size, steps: int, dropout: float) -> list[Case]:
    """Return the kinds of training to measure on a model."""
    common = ("--model", folder, "--batch", str(size.batch), "--length", str(size.length), "--steps", str(steps))
    common = (*common, "--dropout", str(dropout))
    found = []
    for name, quant_type in (("QLoRA", "nf4"), ("LoRA bf16", "none")):
        given = (*common, "--quant-type", quant_type)
        recompute = tuple(part for setting in CHECKPOINTING for part in ("--set", setting))
        ours = Side(f"{name}: lorakit", "bench.sides.lorakit_step", given)
        lean = Side(f"{name}: lorakit, checkpointing", "bench.sides.lorakit_step", (*given, *recompute))
        peers = [peft_side(f"{name}: PEFT, {setting}", (*given, *SETTINGS[setting])) for setting in size.settings]
        peer_lean = peft_side(f"{name}: PEFT, {CHECKPOINTED}", (*given, "--gradient-checkpointing"))
        found.append(Case(name, ours, lean if CHECKPOINTING else None, tuple(peers), peer_lean))
    if size.full:
        given = (*common, "--quant-type", "none", "--full")
        peers = [peft_side(f"full: transformers, {kind}", (*given, "--attention", kind)) for kind in ("sdpa", "eager")]
        found.append(Case("full", None, None, tuple(peers), None))
    return found


def peft_side(name: str, given: tuple[str, ...]) -> Side:
    """Return a side that runs the peers' script."""
    return Side(name, "bench.sides.peft_step", given)


def measure(found: Sequence[Case], rounds: int) -> Seen:
    """Measure every side once, then ours and each case's fastest peer, in turn."""
    seen = alternate([side for case in found for side in case.sides], 1)
    again = [side for case in found for side in (case.ours, fastest(case, seen)) if side is not None]
    for side, runs in alternate(again, rounds - 1).items():
        seen[side] += runs
    return seen


def fastest(case: Case, seen: Seen) -> Side:
    """Return the peers' setting with the shortest step."""
    return min(case.peers, key=lambda side: step_seconds(seen[side]))


def check_losses(found: Sequence[Case], seen: Seen) -> None:
    """Raise AssertionError if the sides' first losses, with the adapter at its start, differ."""
    for case in found:
        losses = {side.name: seen[side][0]["losses"][0] for side in case.sides}
        if max(losses.values()) - min(losses.values()) > LOSS_TOLERANCE * min(losses.values()):
            raise AssertionError(f"the first losses differ: {losses}")


def targets(found: Sequence[Case], seen: Seen, size: Size, interpreter: float) -> list[Target]:
    """Return the targets of the comparison."""
    result = []
    full = next((fastest(case, seen) for case in found if case.ours is None), None)
    for case in found:
        if case.ours is None:
            continue
        seconds = step_seconds(seen[case.ours])
        result.append(
            Target(f"{case.name}: PEFT's step / ours", step_seconds(seen[fastest(case, seen)]) / seconds, SPEEDUP, True)
        )
        pairs = [("peak memory", case.ours, min(peak(seen[side], interpreter) for side in case.peers))]
        if case.ours_lean is not None and case.peer_lean is not None:
            pairs.append(("peak memory, checkpointing", case.ours_lean, peak(seen[case.peer_lean], interpreter)))
        for what, side, theirs in pairs:
            result.append(Target(f"{case.name}: {what} of PEFT's", peak(seen[side], interpreter) / theirs, MEMORY))
        if full is not None:
            ratio = step_seconds(seen[full]) / seconds
            result.append(Target(f"{case.name}: transformers' full fine-tuning step / ours", ratio, OVER_FULL, True))
    if size.qlora_of_lora is not None:
        qlora, lora = (step_seconds(seen[case.ours]) for case in found[:2] if case.ours is not None)
        result.append(Target("our QLoRA step / our LoRA step", qlora / lora, size.qlora_of_lora))
    return result


def peak(runs: Sequence[Figures], interpreter: float) -> float:
    """Return the peak memory above a bare interpreter's, in MiB."""
    return middle(runs, "peak_mb") - interpreter


def rows(seen: Seen, tokens: int, interpreter: float) -> list[list[object]]:
    """Return a row for each side."""
    return [
        [
            side.name, len(runs), step_seconds(runs), tokens / step_seconds(runs), peak(runs, interpreter) / 1024,
            middle(runs, "imports_mb") / 1024, middle(runs, "loaded_mb") / 1024, runs[0]["losses"][0],
        ]
        for side, runs in seen.items()
    ]  # fmt: skip


def main() -> None:
    """Measure, print, compare with the targets."""
    parser = arguments(str(__doc__))
    parser.add_argument("--model", choices=SIZES, default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each process")
    parser.add_argument("--dropout", type=float, default=0.0, help="lora_dropout of the adapters")
    options = parser.parse_args()
    size, interpreter = SIZES[options.model], interpreter_mb()
    found = cases(str(model_folder(options.model)), size, options.steps, options.dropout)
    seen = measure(found, options.rounds)
    check_losses(found, seen)
    columns = ["side", "runs", "s a step", "tokens/s", "peak GiB", "imports GiB", "loaded GiB", "first loss"]
    title = f"{options.model}, {size.batch} x {size.length} tokens, interpreter {interpreter:.1f} MiB"
    table = rows(seen, size.batch * size.length, interpreter)
    finish(options, title, columns, table, targets(found, seen, size, interpreter))


if __name__ == "__main__":
    main()
