"""Small things that tests are made of: tokenizers, decoders, checkpoint folders, conversations, layers, adapters.

A first test takes a line or two of these:

    model = small_decoder()                       # a frozen Llama of two layers, fp32, random weights
    model = small_decoder(**ARCHITECTURES["qwen3"])
    model = adapted(r=4, quantized=True)          # the same in NF4, with an adapter
    tok = small_tokenizer(tmp_path)               # ChatML, 389 tokens, trained on a few lines
    train(model, tok, conversations(8), TrainConfig(max_steps=4, batch_size=4, progress=False))
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn

from lorakit import Decoder, Linear4bit, LoraConfig, Record, adapter_parameters, add_adapter, save_records, set_adapter
from lorakit.adapters import adapter_configs, adapter_modules, lora_layers
from lorakit.data import Message
from lorakit.layers import BASE
from lorakit.models import DecoderConfig, Tokenizer, load_tokenizer

# ---- tokenizers ------------------------------------------------------------------------------------------------------

TEXT = [
    "The quick brown fox jumps over the lazy dog.\n\nIt does so every day, and the dog does not mind.\n",
    "user\nWhat is the capital of France?\n\n\nassistant\nParis is the capital of France.",
    '{"topic": "science", "reply": "Water boils at 100 °C."}\n    def f(x):\n        return x + 1\n\n\n\n',
]


def make_tokenizer(
    folder: Path,
    template: str,
    special: Sequence[str],
    eos: Sequence[str],
    build: Callable[[], tokenizers.Tokenizer],
    plain: Sequence[str] = (),
) -> Tokenizer:
    """Save a tokenizer with its template and special tokens (the first is BOS) into a folder and load it from there."""
    backend = build()
    backend.add_special_tokens(list(special))
    backend.add_tokens(list(plain))
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": eos[0], "bos_token": special[0], "chat_template": template}
    _write(folder / "tokenizer_config.json", config)
    _write(folder / "generation_config.json", {"eos_token_id": [backend.token_to_id(token) for token in eos]})
    return load_tokenizer(folder)


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2's kind: bytes as characters, so a character outside the merges takes several tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(TEXT, _trainer(pre_tokenizers.ByteLevel.alphabet()))
    return backend


def byte_level_trimmed() -> tokenizers.Tokenizer:
    """As `byte_level`, with the post-processor that trims the spaces from offsets, so that " " has none."""
    backend = byte_level()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return backend


def newline_merging() -> tokenizers.Tokenizer:
    """A tokenizer that splits nothing before merging: "\\n" of a header and "\\n" of a content become one token."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(["\n\n"] * 4, _trainer(pre_tokenizers.ByteLevel.alphabet()))
    return backend


def sentencepiece() -> tokenizers.Tokenizer:
    """Llama 2's kind: "▁" for spaces, one put before each stretch of text, bytes for unknown characters."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizer
    trained.train_from_iterator(TEXT, _trainer([]))
    model = json.loads(trained.to_str())["model"]
    vocabulary = model["vocab"] | {f"<0x{byte:02X}>": len(model["vocab"]) + byte for byte in range(256)}
    merges = [tuple(merge) for merge in model["merges"]]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def _trainer(alphabet: Sequence[str]) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(vocab_size=420, initial_alphabet=list(alphabet), show_progress=False)


# ---- decoders, their folders, and conversations ----------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 400  # a row for each of the 389 tokens of `byte_level`, and some to spare

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


# ---- layers and adapters to merge ------------------------------------------------------------------------------------

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[1, 5, 99, 17, 3, 250]])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def mlp(four_bit: bool = False, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two linear layers, the first in 4 bits if asked for."""
    torch.manual_seed(0)
    first, second = nn.Linear(64, 48), nn.Linear(48, 32, bias=False)
    model = nn.Sequential(first, nn.ReLU(), second).to(dtype)
    if four_bit:
        model[0] = Linear4bit.from_linear(first)
    return model.requires_grad_(False)


def adapt(model: nn.Module, name: str = "default", size: float = 0.3, **settings: Any) -> None:
    """Attach a random adapter whose update of every layer has `size` times the norm of its weight."""
    torch.manual_seed(sum(map(ord, name)))
    add_adapter(model, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **settings), name)
    for layer in lora_layers(model, name).values():
        update = layer.scaling[name] * layer.lora_B[name].flatten(1) @ layer.lora_A[name].flatten(1)
        layer.lora_B[name].data *= size * layer.base_weight(torch.float32).norm() / update.norm()
        for magnitude in (p for key, p in layer.parameters_of(name).items() if "magnitude" in key):
            magnitude.data *= 1 + 0.1 * torch.randn_like(magnitude)


def one_layer(base: nn.Module, **settings: Any) -> nn.Sequential:
    """Put a layer into a model by itself and adapt it with random numbers, at rank 3."""
    model = nn.Sequential(base).requires_grad_(False)
    torch.manual_seed(2)
    add_adapter(model, LoraConfig(r=3, target_modules=["0"], **settings))
    for parameter in adapter_parameters(model):
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def added(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """Return what the adapter of `one_layer` adds to the layer's product with x."""
    layer = lora_layers(model)["0"]
    update = layer.apply_matrix(layer.as_matrix(layer.delta_weight("default")), x)
    offset = layer.delta_bias("default")
    return update if offset is None else update + offset


def full_snapshot(model: nn.Module) -> tuple[dict[str, int], dict[str, bytes], set[str], list[bool], list[set[str]]]:
    """Objects, bytes, adapters and their states: what a failed call, or a merge and its reversal, leaves as it was."""
    modules = {
        path: id(module)
        for path, module in model.named_modules(remove_duplicate=False)
        if not isinstance(module, nn.ParameterDict)  # a layer makes one when it needs it
    }
    tensors = dict(sorted((*model.named_parameters(), *model.named_buffers())))
    modules |= {name: id(tensor) for name, tensor in tensors.items()}
    raw = {name: t.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}
    active = [set(layer.active) for layer in adapter_modules(model).values()]
    return modules, raw, set(adapter_configs(model)), [t.requires_grad for t in tensors.values()], active


def adapted(seed: int = 0, quantized: bool = False, **lora: Any) -> Decoder:
    """Return a small decoder with an adapter of rank 4, or as `lora` says. `quantized` puts all but the head in NF4."""
    model = small_decoder()
    if quantized:
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and path != "lm_head":
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, Linear4bit.from_linear(module))
    torch.manual_seed(seed)
    add_adapter(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **lora}))
    return model


def alone(model: nn.Module, name: str) -> None:
    """Make one adapter, or with "__base__" none, the active one: what a row that uses it is compared with."""
    set_adapter(model, [] if name == BASE else name)
