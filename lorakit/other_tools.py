"""What keys of other tools' recipes (transformers, TRL, Axolotl, LLaMA-Factory, Unsloth) are called in lorakit's."""

from __future__ import annotations

from collections.abc import Container

_BATCH = "train.batch_size: all conversations of a step; train.micro_batch_tokens sets the memory, not the result"
_SCHEDULE = "the rate rises, then falls along half a cosine; see train.warmup_ratio and train.min_lr_ratio"
_DTYPE = "model.dtype: bfloat16, float16 or float32"
_QUANT = "model.quant_type: nf4, fp4, or null for none"

# Key elsewhere -> lorakit's, and after a colon what to know about it. Without a dot: there is no such key, and why.
OTHER_TOOLS = {
    "learning_rate": "train.lr",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "n_epochs": "train.epochs",
    "num_steps": "train.max_steps",
    "max_train_steps": "train.max_steps",
    "per_device_train_batch_size": _BATCH,
    "per_device_batch_size": _BATCH,
    "train_batch_size": _BATCH,
    "micro_batch_size": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "per_device_eval_batch_size": "eval.batch_size",
    "warmup_steps": "train.warmup_ratio: a share of the steps",
    "optim": "train.optimizer",
    "adam_beta1": "train.betas",
    "adam_beta2": "train.betas",
    "adam_epsilon": "train.eps",
    "gradient_checkpointing": "train.checkpointing",
    "gradient_clipping": "train.max_grad_norm",
    "torch_compile": "train.compile",
    "save_steps": "train.checkpoint_every",
    "eval_steps": "train.eval_every",
    "output_dir": "output",
    "run_name": "title",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "sequence_len": "data.max_length",
    "model_max_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "dataset": "data.train: a JSONL file",
    "datasets": "data.train: a JSONL file",
    "train_file": "data.train",
    "train_dataset": "data.train: a JSONL file",
    "eval_dataset": "data.eval: a JSONL file",
    "validation_file": "data.eval",
    "val_set_size": "data.eval_fraction",
    "test_size": "data.eval_fraction",
    "val_size": "data.eval_fraction",
    "model_name_or_path": "model.path",
    "base_model_name_or_path": "model.path",
    "base_model": "model.path",
    "model_name": "model.path",
    "device_map": "model.device",
    "bf16": _DTYPE,
    "fp16": _DTYPE,
    "torch_dtype": _DTYPE,
    "bnb_4bit_compute_dtype": _DTYPE,
    "load_in_4bit": _QUANT,
    "load_in_8bit": _QUANT,
    "quantization_bit": _QUANT,
    "bnb_4bit_quant_type": _QUANT,
    "bnb_4bit_use_double_quant": "model.double_quant",
    "rank": "lora.r",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    "lora_target_modules": "lora.target_modules",
    "lora_target": "lora.target_modules",
    "lr_scheduler_type": _SCHEDULE,
    "lr_scheduler": _SCHEDULE,
    "logging_steps": "every step is logged",
    "packing": "conversations are always packed, each apart from the others",
    "sample_packing": "conversations are always packed, each apart from the others",
    "train_on_inputs": "the assistant's turns are trained, nothing else",
    "resume_from_checkpoint": "give --resume to the command",
}


def other_tools_hint(key: str, fields: Container[str]) -> str:
    """Return "; here it is called ..." for a key of another tool, or "".

    Args:
        fields: the keys of the section in which it was found; one of them is named without its section.
    """
    meant = OTHER_TOOLS.get(key.casefold())
    if meant is None:
        return ""
    name, colon, note = meant.partition(": ")
    if " " in name:
        return f"; {meant}"
    own = name.rpartition(".")[2]
    return f"; here it is called '{own if own in fields else name}'{colon}{note}"
