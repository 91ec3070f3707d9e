"""The training step of PEFT + bitsandbytes + transformers, or of transformers alone with all weights trained.

Run as: python -m bench.sides.peft_step --model FOLDER [--quant-type none] [--full] [--dora] [--attention eager]
                                        [--adapter-dtype float32] [--gradient-checkpointing]

The settings follow the peers' documentation, with an option where it leaves a choice: bf16 weights and computation; NF4
with double quantization, computing in bf16; sdpa or eager attention; the adapter in fp32 (PEFT's default) or in bf16
(`autocast_adapter_dtype=False`, as TRL does for 4-bit models); gradient checkpointing without re-entrance. AdamW is
fused, as in transformers' Trainer. `prepare_model_for_kbit_training` is left out, because it casts the embedding and
the norms to fp32, which costs the peers memory and time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import: everything is on disk

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

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


def load(
    folder: os.PathLike[str], quant_type: str, attention: str, dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """Load a checkpoint, its linear layers in 4 bits unless quant_type is "none", the rest in `dtype`."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attention,
        quantization_config=None if quant_type == "none" else quantization,
        device_map="cpu",
    )


def add_adapter(model: PreTrainedModel, dtype: torch.dtype, use_dora: bool = False, dropout: float = 0.0) -> nn.Module:
    """Attach LoRA matrices in `dtype` to all linear layers except the head."""
    common = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    config = LoraConfig(use_dora=use_dora, lora_dropout=dropout, **common)
    model = get_peft_model(model, config, autocast_adapter_dtype=dtype == torch.float32)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)  # PEFT's switch does not cast matrices on 4-bit layers
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    """Take the steps, print the figures."""
    parser = step_arguments(__doc__)
    parser.add_argument("--full", action="store_true", help="train all weights, no adapter")
    parser.add_argument("--dora", action="store_true", help="a DoRA adapter")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--adapter-dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    options = parser.parse_args(arguments)
    meter = Meter()
    model = load(options.model, options.quant_type, options.attention)
    ids = random_tokens(model.config.vocab_size, options.batch, options.length)
    if options.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if not options.full:
        model = add_adapter(model, getattr(torch, options.adapter_dtype), options.dora, options.dropout)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step(number: int) -> float:
        if options.ragged:
            sizes = torch.tensor(lengths(options, number))
            mask = (torch.arange(int(sizes.max())) < sizes[:, None]).long()
            padded = ids[:, : mask.shape[1]]
            given = {"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, -100)}
        else:
            given = {"input_ids": ids, "labels": ids}
        loss = model(**given, use_cache=False).loss  # shifted by one inside
        loss.backward()
        nn.utils.clip_grad_norm_(trained, GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    meter.loaded()
    meter.take_steps(step, options.steps)
    meter.print(trained=sum(parameter.numel() for parameter in trained))


if __name__ == "__main__":
    main()
