"""Small random decoders of every supported architecture, and checkpoint folders of them with a real tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from small_tokenizers import byte_level, make_tokenizer

from lorakit import Decoder, Record, save_records
from lorakit.data import Message
from lorakit.models import DecoderConfig, Tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 400  # a row for each of the 389 tokens of `small_tokenizers.byte_level`, and some to spare

# One of each kind: grouped queries, biases, norms on queries and keys, a head that is tied or not, heads whose size is
# not hidden / heads.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "llama-biases-tied": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "mistral": {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 1, "head_dim": 6},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 4, "head_dim": 16},
}


def small_config(**changes: Any) -> dict[str, Any]:
    """Return the contents of a config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        **changes,
    }


def small_decoder(seed: int = 0, **changes: Any) -> Decoder:
    """Return a frozen fp32 decoder in eval mode; its weights are random, norms and biases included."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Decoder(DecoderConfig.from_dict(small_config(**changes)))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data = 1 + 0.2 * torch.randn_like(parameter)
            elif "embed_tokens" in name and model.config.tie_word_embeddings:
                parameter.data *= 0.2  # or every token would predict itself
    return model.requires_grad_(False).eval()


def write_checkpoint(folder: Path, model: Decoder, config: dict[str, Any] | None = None, shards: int = 1) -> Path:
    """Write config.json, the weights in bfloat16 in so many shards, and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or small_config()), encoding="utf-8")
    tensors = {name: tensor.bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    write_weights(folder, tensors, shards)
    make_tokenizer(folder, CHATML, SPECIAL, ["<|im_end|>"], byte_level)
    return folder


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Write tensors as model.safetensors, or as shards with their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    files = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in files if files[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def small_tokenizer(folder: Path) -> Tokenizer:
    """Return a tokenizer for these models."""
    return make_tokenizer(folder, CHATML, SPECIAL, ["<|im_end|>"], byte_level)


def conversations(count: int, start: int = 0) -> list[Record]:
    """Return conversations of uneven lengths with an answer that follows from the question."""
    names = ["red", "the lazy dog", "x", "France and its capital", "brown fox"]
    return [
        Record(
            (
                Message("user", f"{names[i % len(names)]} {i}?"),
                Message("assistant", f"{names[i % len(names)]}!"),
            ),
            f"train.jsonl:{i + 1}",
        )
        for i in range(start, start + count)
    ]


RECIPE = """\
title: small talk
output: run
model:
  path: model
  quant_type: nf4
  dtype: float32
data:
  train: train.jsonl
  eval: eval.jsonl
lora:
  r: 4
  lora_dropout: 0.1
train:
  lr: 1e-2
  max_steps: 4
  batch_size: 4
  progress: false
eval:
  metrics: [exact_match]
  base_prompt:
    instructions: Repeat the question.
    examples: 1
  max_new_tokens: 6
  general_text: general.txt
  bootstrap_samples: 100
"""


def write_run_folder(folder: Path) -> Path:
    """Write what a run needs: model/, train.jsonl, eval.jsonl, general.txt, and recipe.yaml with relative paths."""
    model = small_decoder()
    model.lm_head.weight.data *= 4  # or no hidden state could be sure of a token
    write_checkpoint(folder / "model", model)
    save_records(folder / "train.jsonl", conversations(8))
    save_records(folder / "eval.jsonl", conversations(3, start=20))
    (folder / "general.txt").write_text(
        "Water boils at 100 °C, and the lazy dog does not mind.\n" * 5, encoding="utf-8"
    )
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder
