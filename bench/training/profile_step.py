"""The time of a training step of lorakit by kind of work, from PyTorch's profiler.

    QLoRA of SmolLM2-135M, rank 16 on all linear layers, 2 x 512 tokens, all trained

"products of frozen weights alone" is the time of these products by themselves, in dense bf16. No step can take less.
Only the time of an operation itself counts, without the operations that it calls, so the kinds add up to the whole.

Run as: python -m bench.profile_step [--json FILE]
"""

from __future__ import annotations

import re
import time

from torch.profiler import ProfilerActivity, profile

from bench.harness.make_llama import model_folder
from bench.harness.report import arguments, finish
from bench.training.sides.common import ALPHA, LEARNING_RATE, RANK, random_tokens
from bench.training.sides.products import product_seconds
from lorakit import LoraConfig, TrainConfig, add_adapter, load_model
from lorakit.data import Example
from lorakit.training.optimizers.build import build_optimizer
from lorakit.training.trainer import take_step

BATCH, LENGTH = 2, 512
KINDS = {  # the first whose pattern an operation's name matches
    "products of weights and adapters": r"aten::(mm|addmm_?)$",
    "products of attention": r"aten::bmm$",
    "softmax of attention": r"aten::_softmax",
    "4-bit weights to values, and calls": r"lorakit::(add_)?linear_4bit",
    "norms, rotary embedding, SwiGLU": r"lorakit::(rms_norm|rope|swiglu)|GeneratedBackward",
    "loss": r"lorakit::cross_entropy|_LinearCrossEntropy",
    "copies and casts": r"aten::(copy_|_to_copy|to|clone|contiguous|cat|stack|index_copy)",
    "sums": r"aten::(add|add_|mul|mul_|sum)$",
    "optimizer and clipping": r"aten::(_fused_adamw_|linalg_vector_norm|_foreach)",
}


def main() -> None:
    """Measure, print."""
    options = arguments(str(__doc__)).parse_args()
    model = load_model(model_folder("smollm2-135m-instruct"), "nf4")
    add_adapter(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))
    config = TrainConfig(lr=LEARNING_RATE, micro_batch_tokens=BATCH * LENGTH)
    optimizer = build_optimizer({name: p for name, p in model.named_parameters() if p.requires_grad}, config)
    examples = [
        Example(row.tolist(), [False] + [True] * (LENGTH - 1), "random")
        for row in random_tokens(model.config.vocab_size, BATCH, LENGTH)
    ]
    model.train()
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        take_step(model, examples, optimizer, config.lr, config)
        seconds.append(time.perf_counter() - started)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        take_step(model, examples, optimizer, config.lr, config)
    spent = dict.fromkeys([*KINDS, "everything else"], 0.0)
    for event in found.key_averages():
        kind = next((kind for kind, pattern in KINDS.items() if re.match(pattern, event.key)), "everything else")
        spent[kind] += event.self_cpu_time_total / 1e6
    whole = sum(spent.values())
    rows: list[list[object]] = [[kind, each, each / whole] for kind, each in spent.items()]
    alone = product_seconds(model, BATCH * LENGTH, forward_passes=1)
    rows += [
        ["the whole step, under the profiler", whole, 1.0],
        ["the whole step, without it (median of 3)", sorted(seconds[1:])[1], None],
        ["products of frozen weights alone", alone, None],
    ]
    finish(options, "One step", ["kind of work", "seconds", "share"], rows)


if __name__ == "__main__":
    main()
