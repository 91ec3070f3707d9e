"""The value of each trick of lorakit's training step: the step without it beside the step with all, and two options.

    QLoRA of SmolLM2-135M, rank 16 on all linear layers, 2 x 512 tokens, all trained

Each row comes from separate processes, in turn. Seconds are medians over all counted steps. Memory is the process's
peak minus the size of a bare interpreter. Conversations with one system prompt benefit from another trick, the shared
prefix, which random tokens cannot show.

Two rows are options, not tricks: the step with all tricks plus dropout on the adapters' inputs, or plus
`TrainConfig(compile=True)`. The first step, which compiles, has its own column. Each process starts without code that
another one compiled.

Run as: python -m bench.tricks [--rounds 3] [--steps 4] [--only TEXT] [--json FILE]
"""

from __future__ import annotations

from bench.harness.make_llama import model_folder
from bench.harness.processes import Side, alternate, interpreter_mb, middle, step_seconds
from bench.harness.report import arguments, finish
from bench.training.sides.without import WITHOUT


def sides(folder: str, steps: int) -> dict[str, Side]:
    """Return the step with everything, and without each trick."""
    common = ("--model", folder, "--steps", str(steps))
    found = {"all": Side("with all", "bench.sides.lorakit_step", common)}
    for trick in WITHOUT:
        found[trick] = Side(f"without {trick}", "bench.sides.lorakit_step", (*common, "--without", trick))
    found["dropout"] = Side("with all, dropout 0.05", "bench.sides.lorakit_step", (*common, "--dropout", "0.05"))
    found["compiled"] = Side("with all, compiled", "bench.sides.lorakit_step", (*common, "--set", "compile=true"))
    return found


def main() -> None:
    """Measure, print."""
    parser = arguments(str(__doc__))
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each process")
    parser.add_argument("--only", default="", help="only tricks whose name contains this, and the step with all")
    options = parser.parse_args()
    interpreter = interpreter_mb()
    every = sides(str(model_folder("smollm2-135m-instruct")), options.steps)
    each = {name: side for name, side in every.items() if name == "all" or options.only in name}
    seen = alternate(list(each.values()), options.rounds)
    seconds = {name: step_seconds(seen[side]) for name, side in each.items()}
    peaks = {name: middle(seen[side], "peak_mb") - interpreter for name, side in each.items()}
    first = {name: middle(seen[side], "first_seconds") for name, side in each.items()}
    rows = [
        [
            each[name].name,
            seconds[name], seconds[name] / seconds["all"],
            peaks[name], peaks[name] - peaks["all"],
            first[name],
        ]
        for name in each
    ]  # fmt: skip
    columns = ["step", "seconds", "of the step with all", "peak MiB", "MiB more", "first step, seconds"]
    finish(options, "What each trick is worth", columns, rows)


if __name__ == "__main__":
    main()
