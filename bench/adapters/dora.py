"""The cost of DoRA: our LoRA step, our DoRA step and PEFT's DoRA step on one model.

The model is llama-1b, the shape and vocabulary of Llama-3.2-1B with random weights, at 1 x 1,024 tokens, or the real
SmolLM2. All linear layers have rank 16, every token except the first is trained, the optimizer is AdamW. The base
weights are NF4 with double quantization, or bf16. A DoRA adapter starts without an effect, so all sides must report the
same first loss.

A separate process for each figure loads the model, takes a step that is not counted and then --steps counted steps. Our
sides take turns for --rounds. PEFT's side, whose step is several times as long, runs once. Peak memory is the process's
peak resident size minus that of a bare Python interpreter.

Run as: python -m bench.dora [--model llama-1b] [--rounds 3] [--steps 3] [--check] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.harness.make_llama import model_folder
from bench.harness.plot import Picture
from bench.harness.processes import Figures, Side, alternate, interpreter_mb, middle, step_seconds
from bench.harness.report import Target, arguments, finish

LENGTHS = {"llama-1b": 1024, "smollm2-135m-instruct": 1024}
SLOWER, LARGER = 1.15, 1.2  # limits of our DoRA step's time and peak memory, as multiples of our LoRA step's
LOSS_TOLERANCE = 0.01  # relative difference of the sides' first losses: all round to bf16, in different places
WHO = ("lorakit LoRA", "lorakit DoRA", "PEFT DoRA")

Sides = dict[str, Side]  # by WHO
Seen = dict[Side, list[Figures]]


def cases(folder: str, length: int, steps: int) -> dict[str, Sides]:
    """Return the sides of each kind of base weight."""
    found = {}
    for name, quant_type in (("NF4", "nf4"), ("bf16", "none")):
        given = ("--model", folder, "--batch", "1", "--length", str(length), "--steps", str(steps))
        given = (*given, "--quant-type", quant_type)
        modules = ("bench.sides.lorakit_step", "bench.sides.lorakit_step", "bench.sides.peft_step")
        extra: tuple[tuple[str, ...], ...] = ((), ("--dora",), ("--dora",))
        found[name] = {
            who: Side(f"{name}: {who}", module, (*given, *more))
            for who, module, more in zip(WHO, modules, extra, strict=True)
        }
    return found


def measure(found: dict[str, Sides], rounds: int) -> Seen:
    """Measure ours in turn, the peer once."""
    ours = [sides[who] for sides in found.values() for who in WHO[:2]]
    return alternate(ours, rounds) | alternate([sides[WHO[2]] for sides in found.values()], 1)


def check_losses(found: dict[str, Sides], seen: Seen) -> None:
    """Raise AssertionError if the sides' first losses differ."""
    for sides in found.values():
        losses = {side.name: seen[side][0]["losses"][0] for side in sides.values()}
        if max(losses.values()) - min(losses.values()) > LOSS_TOLERANCE * min(losses.values()):
            raise AssertionError(f"the first losses differ: {losses}")


def targets(found: dict[str, Sides], seen: Seen, interpreter: float) -> list[Target]:
    """Compare DoRA with plain LoRA, and the peer with ours."""
    result = []
    for name, sides in found.items():
        lora, dora, peer = (seen[sides[who]] for who in WHO)
        result += [
            Target(f"{name}: our DoRA step / our LoRA step", step_seconds(dora) / step_seconds(lora), SLOWER),
            Target(f"{name}: peak memory", peak(dora, interpreter) / peak(lora, interpreter), LARGER),
            Target(f"{name}: PEFT's DoRA step / ours", step_seconds(peer) / step_seconds(dora), 1.0, True),
        ]
    return result


def peak(runs: Sequence[Figures], interpreter: float) -> float:
    """Return the peak memory above a bare interpreter's, in MiB."""
    return middle(runs, "peak_mb") - interpreter


def main() -> None:
    """Measure, print, draw, compare with the targets."""
    parser = arguments(str(__doc__), plots=True)
    parser.add_argument("--model", choices=LENGTHS, default="llama-1b")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each of our sides")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each process")
    options = parser.parse_args()
    interpreter, length = interpreter_mb(), LENGTHS[options.model]
    found = cases(str(model_folder(options.model)), length, options.steps)
    seen = measure(found, options.rounds)
    check_losses(found, seen)
    rows = [
        [side.name, len(runs), step_seconds(runs), peak(runs, interpreter) / 1024, runs[0]["losses"][0]]
        for side, runs in seen.items()
    ]
    picture = Picture("s a step")
    for name, sides in found.items():
        picture.bars[name] = {who: step_seconds(seen[side]) for who, side in sides.items()}
        picture.marks[name] = {}
    columns = ["side", "runs", "s a step", "peak GiB", "first loss"]
    title = f"{options.model}, 1 x {length} tokens, interpreter {interpreter:.1f} MiB"
    finish(options, title, columns, rows, targets(found, seen, interpreter), picture)


if __name__ == "__main__":
    main()
