"""Peak memory of training on the CPU: what `lorakit.plan` predicts from config.json, and what processes take.

Each configuration is a process of its own that loads the model and takes three steps (`bench.sides.lorakit_step`). They
differ in shape, format of the weights, length, batch, checkpointing, optimizer and adapter. `runtime` is the memory of
a process that trains next to nothing, which the prediction starts from; it is measured first, unless --constant asks
for the library's own constant.

Run as: python -m bench.plan [--check] [--json FILE] [--folder DIR] [--constant] [--only TEXT]
Checkpoints with random weights are made in DIR (default: a temporary folder, removed at the end).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness.make_llama import LLAMA_7B, SMOLLM2, make_llama
from bench.harness.processes import Side
from bench.harness.report import Target, arguments, finish
from bench.training.sides.common import ALPHA, RANK
from lorakit import LoraConfig, Plan, TrainConfig, plan
from lorakit.models import DecoderConfig
from lorakit.planning import measure_runtime

MOST_OFF = 0.07
WIDE = LLAMA_7B | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "num_attention_heads": 32}
GROUPED = WIDE | {
    "vocab_size": 128256, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 10,
    "num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip
SHAPES = {"smollm2-135m": SMOLLM2, "4 x 2048": WIDE, "10 x 1024, 128k": GROUPED}


@dataclass(frozen=True)
class Case:
    """A configuration: a shape, sequences and their length, the weights' type, settings of TrainConfig, DoRA."""

    shape: str
    batch: int
    length: int
    quant_type: str | None = "nf4"
    settings: tuple[tuple[str, str | int], ...] = ()
    dora: bool = False

    def __str__(self) -> str:
        settings = "".join(f", {name}={value}" for name, value in self.settings) + ", DoRA" * self.dora
        return f"{self.quant_type or 'bf16'}, {self.batch} x {self.length}{settings}"

    def predicted(self, runtime_bytes: int | None) -> Plan:
        """Return the plan."""
        values: dict[str, Any] = {"batch_size": self.batch, "micro_batch_tokens": self.batch * self.length}
        train = TrainConfig(**values | dict(self.settings))
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=self.dora)
        config = DecoderConfig.from_dict(SHAPES[self.shape])
        return plan(
            config, lora, train, quant_type=self.quant_type, sequence_length=self.length, runtime_bytes=runtime_bytes
        )

    def measured(self, folder: Path) -> float:
        """Return the peak resident memory of a process, in MiB."""
        options = ["--model", str(folder), "--quant-type", self.quant_type or "none", "--steps", "2"]
        options += ["--batch", str(self.batch), "--length", str(self.length)]
        for name, value in self.settings:
            options += ["--set", f"{name}={value}"]
        options += ["--dora"] * self.dora
        return float(Side(f"{self.shape}: {self}", "bench.sides.lorakit_step", tuple(options)).measure()["peak_mb"])


LAYER, MLP, SECOND = (("checkpointing", "layer"),), (("checkpointing", "mlp"),), (("checkpointing", 2),)
SMALL_STATE = (("optimizer", "adamw_8bit"),)
CASES = (
    Case("smollm2-135m", 2, 512),
    Case("smollm2-135m", 2, 512, settings=LAYER),
    Case("smollm2-135m", 1, 2048, settings=MLP),
    Case("smollm2-135m", 4, 256, None, SMALL_STATE),
    Case("smollm2-135m", 8, 128, settings=(("micro_batch_tokens", 512), *SECOND)),
    Case("4 x 2048", 1, 512, settings=SMALL_STATE),
    Case("4 x 2048", 2, 512),
    Case("4 x 2048", 4, 512, settings=LAYER),
    Case("4 x 2048", 1, 1024, None, MLP),
    Case("10 x 1024, 128k", 2, 384),
    Case("10 x 1024, 128k", 4, 256, settings=(*SECOND, *SMALL_STATE)),
    Case("10 x 1024, 128k", 4, 512, settings=(("micro_batch_tokens", 512), *LAYER)),
    # Not among those that the constants of lorakit/planning/runtime.py were fitted to:
    Case("smollm2-135m", 1, 1024, settings=(("checkpointing", 3),)),
    Case("smollm2-135m", 3, 640, None, MLP),
    Case("4 x 2048", 1, 1536, settings=MLP),
    Case("10 x 1024, 128k", 1, 1024, None, (("optimizer", "lion"),)),
    Case("smollm2-135m", 2, 512, dora=True),
    Case("smollm2-135m", 2, 512, settings=(("lora_fa", "true"),)),
)


def main() -> None:
    """Make the checkpoints, measure, compare."""
    parser = arguments(str(__doc__))
    parser.add_argument("--folder", type=Path, help="where the checkpoints are, or are made")
    parser.add_argument("--constant", action="store_true", help="predict with the library's constant for the runtime")
    parser.add_argument("--only", default="", help="configurations whose name has this in it")
    options = parser.parse_args()
    runtime = None if options.constant else measure_runtime()
    rows, worst = [], 0.0
    with tempfile.TemporaryDirectory() as temporary:
        for case in CASES:
            if options.only not in f"{case.shape}: {case}":
                continue
            folder = (options.folder or Path(temporary)) / case.shape.replace(" ", "")
            if not (folder / "config.json").exists():
                folder.mkdir(parents=True, exist_ok=True)
                make_llama(folder, SHAPES[case.shape])
            predicted, seen = case.predicted(runtime), case.measured(folder)
            mib = {name: size / 2**20 for name, size in predicted.parts.items()}
            total = predicted.peak_bytes / 2**20
            worst = max(worst, abs(total / seen - 1))
            parts = [mib["runtime"], mib["weights"], mib["adapters"] + mib["gradients"] + mib["optimizer"]]
            parts += [mib["activations"], mib["workspace"] + mib["logits"], mib["allocator"]]
            rows.append((case.shape, str(case), seen, total, 100 * (total / seen - 1), *parts))
    columns = ("shape", "configuration", "measured MiB", "predicted MiB", "off by %")
    columns += ("runtime", "weights", "adapter", "activations", "workspace", "allocator")
    targets = [Target("largest deviation of a predicted peak", worst, MOST_OFF)]
    title = f"Peak memory of training on the CPU, rank {RANK}: predicted and measured, MiB"
    finish(options, title, columns, rows, targets)


if __name__ == "__main__":
    main()
