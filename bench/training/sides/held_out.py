"""The held-out loss of saved adapters, all on one 4-bit base, by a function outside both sides' trainers.

transformers computes the logits, bitsandbytes holds the weights in NF4, PEFT loads the adapters. All computation is in
fp32, so that neither side's way of rounding to bf16 has an advantage.

Run as: python -m bench.sides.held_out --model FOLDER --records held-out.jsonl --adapter DIR [--adapter DIR ...]
It prints one line of JSON: folder -> loss in nats per trained token.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import json

import torch
from peft import PeftModel
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

from bench.training.sides.peft_step import load
from bench.training.sides.trl_sft import IGNORED, read

BATCH = 16


@torch.inference_mode()
def held_out_loss(model: nn.Module, examples: Sequence[dict[str, list[int]]]) -> float:
    """Return the mean negative log-likelihood of all labels except ignored ones."""
    total, count = 0.0, 0
    ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
    for batch in (ordered[start : start + BATCH] for start in range(0, len(ordered), BATCH)):
        ids, labels = (
            pad_sequence([torch.tensor(example[key]) for example in batch], batch_first=True, padding_value=filler)
            for key, filler in (("input_ids", 0), ("labels", IGNORED))
        )
        mask = pad_sequence([torch.ones(len(example["input_ids"])) for example in batch], batch_first=True)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        trained = labels[:, 1:] != IGNORED
        total += float(cross_entropy(logits[trained].float(), labels[:, 1:][trained], reduction="sum"))
        count += int(trained.sum())
    return total / count


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each adapter, print the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--adapter", action="append", required=True)
    options = parser.parse_args(arguments)
    examples = read(options.records, AutoTokenizer.from_pretrained(options.model))
    base = load(options.model, "nf4", "sdpa", torch.float32)
    model = PeftModel.from_pretrained(base, options.adapter[0], adapter_name="0")
    for number, folder in enumerate(options.adapter[1:], start=1):
        model.load_adapter(folder, adapter_name=str(number))
    model.train()  # there is no dropout; in eval mode bitsandbytes repacks the weights for one token at a time
    losses = {}
    for number, folder in enumerate(options.adapter):
        model.set_adapter(str(number))
        losses[folder] = held_out_loss(model, examples)
    print(json.dumps(losses))


if __name__ == "__main__":
    main()
