"""lorakit's fine-tuning on conversations: one epoch of QLoRA with `lorakit.train`; saves the adapter before and after.

Run as: python -m bench.sides.lorakit_sft --model FOLDER --records train.jsonl --start DIR --adapter DIR [--seed 0]
It prints one line of JSON; bench.sft runs it and TRL's script in turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bench.training.sides.common import ALPHA, GRAD_NORM, RANK, Meter, digest, sft_arguments
from lorakit import LoraConfig, TrainConfig, add_adapter, load_model, load_records, load_tokenizer, save_adapter, train
from lorakit.data import encode_records


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print the figures."""
    parser = sft_arguments(__doc__)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of TrainConfig")
    options = parser.parse_args(arguments)
    meter = Meter()
    model, tok, records = load_model(options.model), load_tokenizer(options.model), load_records(options.records)
    torch.manual_seed(options.seed)
    add_adapter(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))
    save_adapter(model, options.start)
    settings = dict(setting.split("=", 1) for setting in options.set)
    config = TrainConfig(
        lr=options.lr, batch_size=options.batch, epochs=1, max_length=options.max_length, warmup_ratio=0,
        max_grad_norm=GRAD_NORM, seed=options.seed, progress=False, **settings,
    )  # fmt: skip
    meter.loaded()
    result = train(model, tok, records, config)
    meter.trained()
    save_adapter(model, options.adapter)
    examples = encode_records(tok, records, options.max_length)
    meter.print(
        seconds=[result.seconds], samples=len(records), losses=[row["loss"] for row in result.history],
        digest=digest((example.input_ids, example.loss_mask) for example in examples),
    )  # fmt: skip


if __name__ == "__main__":
    main()
