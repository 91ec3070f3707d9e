"""lorakit's training step: load a checkpoint, attach an adapter to all linear layers, take steps like the trainer.

Run as: python -m bench.sides.lorakit_step --model FOLDER [--quant-type none] [--batch 2] [--length 512]
                                           [--dora] [--dropout 0.05] [--set KEY=VALUE] [--products 1]
It prints one line of JSON; bench.train_step and its relatives run it and the peers' scripts in turn.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from bench.training.sides.common import (
    ALPHA,
    GRAD_NORM,
    LEARNING_RATE,
    RANK,
    Meter,
    lengths,
    random_tokens,
    step_arguments,
)
from bench.training.sides.products import product_seconds
from bench.training.sides.without import WITHOUT
from lorakit import LoraConfig, TrainConfig, add_adapter, load_model
from lorakit.data import Example
from lorakit.training.activations import saving_activations
from lorakit.training.compiling import compiled_layers
from lorakit.training.lora_fa import frozen_a
from lorakit.training.optimizers.build import build_optimizer
from lorakit.training.trainer import take_step


def main(arguments: Sequence[str] | None = None) -> None:
    """Take the steps, print the figures."""
    parser = step_arguments(__doc__)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of TrainConfig")
    parser.add_argument("--dora", action="store_true", help="a DoRA adapter")
    parser.add_argument("--products", type=int, metavar="PASSES", help="also time the frozen weights' products alone")
    parser.add_argument("--without", choices=WITHOUT, help="leave out one trick of the step")
    options = parser.parse_args(arguments)
    if options.without:
        WITHOUT[options.without]()
    meter = Meter()
    model = load_model(options.model, None if options.quant_type == "none" else options.quant_type)
    adapter = {"target_modules": "all-linear", "lora_dropout": options.dropout, "use_dora": options.dora}
    add_adapter(model, LoraConfig(r=RANK, lora_alpha=ALPHA, **adapter))
    settings = dict(setting.split("=", 1) for setting in options.set)
    tokens = options.batch * options.length
    common = {"lr": LEARNING_RATE, "max_grad_norm": GRAD_NORM, "batch_size": options.batch}
    config = TrainConfig(**common | {"micro_batch_tokens": tokens} | settings)
    rows = random_tokens(model.config.vocab_size, options.batch, options.length).tolist()
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # `compile` starts without code from earlier processes
    model.train()
    meter.loaded()
    with (
        frozen_a(model, config.lora_fa),
        saving_activations(model, config.checkpointing),
        compiled_layers(model, config.compile),
    ):
        optimizer = build_optimizer({name: p for name, p in model.named_parameters() if p.requires_grad}, config)

        def step(number: int) -> float:
            batch = [
                Example(row[:length], [False] + [True] * (length - 1), "random")
                for row, length in zip(rows, lengths(options, number), strict=True)
            ]
            return float(take_step(model, batch, optimizer, config.lr, config)["loss"])

        meter.take_steps(step, options.steps)
    alone = {} if options.products is None else {"products": product_seconds(model, tokens, options.products)}
    meter.print(**alone)


if __name__ == "__main__":
    main()
