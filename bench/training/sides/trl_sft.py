"""TRL's fine-tuning on conversations: one epoch of `SFTTrainer` on a 4-bit model with a PEFT adapter.

Run as: python -m bench.sides.trl_sft --model FOLDER --records train.jsonl --start DIR --adapter DIR
                                      [--attention eager] [--no-checkpointing] [--no-autocast] [--max-steps 3]

transformers' own tokenizer and chat template make the tokens. The assistant's turn is trained, from the end of its
header to its end-of-turn token. The script passes input_ids and labels, so that exactly those tokens are trained. From
a prompt and a completion, SFTTrainer would also train the newline after the end-of-turn token. The adapter starts with
the other side's values (--start), and the records are taken in order, eight at a time. TRL trains the adapter of a
4-bit model in bf16. Its defaults are gradient checkpointing and bf16 autocast; options turn them off. Packing and
padding-free batches need FlashAttention, which the CPU does not have.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import: everything is on disk

import json
from pathlib import Path

from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from bench.training.sides.common import GRAD_NORM, Meter, digest, sft_arguments
from bench.training.sides.peft_step import load

IGNORED = -100


def encode(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> dict[str, list[int]]:
    """Return the tokens of a conversation that ends with the assistant's turn, and its labels."""
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert ids[: len(prompt)] == prompt
    end = ids.index(tokenizer.eos_token_id, len(prompt)) + 1
    labels = [token if len(prompt) <= index < end else IGNORED for index, token in enumerate(ids)]
    return {"input_ids": ids, "labels": labels}


def read(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """Read and encode the conversations of a JSON Lines file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [encode(tokenizer, json.loads(line)["messages"]) for line in lines]


def settings(options: Any, output: str) -> SFTConfig:
    """Return TRL's settings for one epoch."""
    return SFTConfig(
        output_dir=output,
        per_device_train_batch_size=options.batch,
        num_train_epochs=1,
        max_steps=options.max_steps,
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        max_grad_norm=GRAD_NORM,
        max_length=options.max_length,
        train_sampling_strategy="sequential",
        gradient_checkpointing=not options.no_checkpointing,
        bf16=not options.no_autocast,
        seed=options.seed,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print the figures."""
    parser = sft_arguments(__doc__)
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep the activations")
    parser.add_argument("--no-autocast", action="store_true", help="compute in the model's own bf16")
    parser.add_argument("--max-steps", type=int, default=-1, help="stop early")
    options = parser.parse_args(arguments)
    meter = Meter()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    examples = read(options.records, tokenizer)
    model = PeftModel.from_pretrained(load(options.model, "nf4", options.attention), options.start, is_trainable=True)
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model, settings(options, output), train_dataset=Dataset.from_list(examples), processing_class=tokenizer
        )
        meter.loaded()
        result = trainer.train()
        meter.trained()
        trainer.save_model(str(options.adapter))
    meter.print(
        seconds=[result.metrics["train_runtime"]],
        samples=options.batch * trainer.state.global_step,
        losses=[row["loss"] for row in trainer.state.log_history if "loss" in row],
        digest=digest((e["input_ids"], [label != IGNORED for label in e["labels"]]) for e in examples),
    )


if __name__ == "__main__":
    main()
