"""Turning a GGUF file into an ordinary Hugging Face checkpoint folder.

The import undoes GGUF's tensor names, its block quantization (`gguf.quants`), its order of the q and k rows
(`gguf_rows`) and its packing of the tokenizer into metadata (`gguf_tokenizer`). Weights are stored as bfloat16, rounded
to nearest even: one moves by at most 2**-8 of its size, where Q4_1 had moved it by up to 1/30 of its block's range.
Every tensor of the file is used; an unknown one is an error, because a model without it would be another model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.safetensors_header import make_header
from ...errors import CheckpointError, did_you_mean
from ...files import atomic_folder, sha256_file
from ..decoder.families import FAMILIES, Family
from .gguf_file import GGUFFile, open_gguf
from .gguf_rows import from_gguf_rows
from .gguf_tokenizer import special_token_ids, tokenizer_files

DTYPE = torch.bfloat16


def import_gguf(gguf_path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Path:
    """Convert a GGUF file to a new or empty folder, whole or not at all.

    Writes config.json, generation_config.json, model.safetensors (bfloat16), tokenizer.json, tokenizer_config.json and
    a README.md that says where the weights come from.

    Returns:
        The folder.

    Raises:
        LorakitError: the gguf package is not installed.
        CheckpointError: the file is missing, truncated, not GGUF, of another architecture or has a feature that is not
            converted; or `folder` already holds something.
        StorageError: `folder` cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: already exists and is not an empty folder; nothing was written")
    with atomic_folder(folder) as part:
        convert_gguf(gguf_path, part)
    return folder


def convert_gguf(gguf_path: str | os.PathLike[str], folder: Path, origin: str = "") -> None:
    """Write the checkpoint's files into an existing folder; `import_gguf` is the safe way to call this.

    The bytes written depend only on the GGUF file and `origin` (a phrase for the README): no dates, no paths.
    """
    source = open_gguf(gguf_path)
    family = _family(source)
    config = _config(source, family)
    texts = {
        "config.json": _json(config),
        "generation_config.json": _json({k: v for k, v in config.items() if k.endswith("_token_id")}),
        "README.md": _readme(source, origin),
        **tokenizer_files(source, config["max_position_embeddings"]),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    _write_weights(source, family, config, folder / "model.safetensors")


def _family(source: GGUFFile) -> Family:
    """Return the family as which a file's architecture is imported."""
    imported = {form.architecture: family for family in FAMILIES.values() if (form := family.gguf) and form.is_imported}
    architecture = source.value("general.architecture", str)
    if architecture not in imported:
        known = ", ".join(f"'{name}'" for name in imported)
        raise CheckpointError(f"{source.path}: architecture '{architecture}' is not supported, only {known}")
    return imported[architecture]


def _config(source: GGUFFile, family: Family) -> dict[str, Any]:
    """Return config.json for the file's metadata; refuse features that the decoder would silently drop."""
    prefix = source.value("general.architecture", str)
    for key in (f"{prefix}.expert_count", f"{prefix}.rope.scaling.type", f"{prefix}.rope.scaling.factor"):
        if source.get(key, object) not in (None, 0, "none"):
            raise CheckpointError(f"{source.path}: '{key}' is set; the import cannot convert that")

    def size(key: str) -> int:
        value = source.value(f"{prefix}.{key}", int)
        if not 0 < value < 2**31:
            raise CheckpointError(f"{source.path}: {prefix}.{key} is {value}, expected a positive size")
        return value

    hidden, heads = size("embedding_length"), size("attention.head_count")
    kv_heads = size("attention.head_count_kv") if f"{prefix}.attention.head_count_kv" in source.fields else heads
    head_dim = source.get(f"{prefix}.attention.key_length", int) or hidden // heads
    rotated = source.get(f"{prefix}.rope.dimension_count", int) or head_dim
    if heads % kv_heads or head_dim % 2 or rotated != head_dim:
        raise CheckpointError(
            f"{source.path}: {heads} heads, {kv_heads} key-value heads, head size {head_dim} with {rotated} rotated: "
            "expected heads to be a multiple of key-value heads, and an even head size, rotated in full"
        )
    ids = {f"{name}_id": token_id for name, token_id in special_token_ids(source).items() if name != "unk_token"}
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": len(source.value("tokenizer.ggml.tokens", list)),
        "hidden_size": hidden,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": family.activations[0],
        "max_position_embeddings": size("context_length"),
        "rms_norm_eps": source.value(f"{prefix}.attention.layer_norm_rms_epsilon", float),
        "rope_theta": source.get(f"{prefix}.rope.freq_base", float) or 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "torch_dtype": "bfloat16",
        **ids,
    }


def _names_and_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield every tensor of the model: its name in GGUF, its name in Hugging Face, its shape."""
    hidden, intermediate, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    yield "token_embd.weight", "model.embed_tokens.weight", (vocabulary, hidden)
    yield "output_norm.weight", "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "output.weight", "lm_head.weight", (vocabulary, hidden)
    for layer in range(config["num_hidden_layers"]):
        gguf, ours = f"blk.{layer}", f"model.layers.{layer}"
        yield f"{gguf}.attn_norm.weight", f"{ours}.input_layernorm.weight", (hidden,)
        yield f"{gguf}.attn_q.weight", f"{ours}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{gguf}.attn_k.weight", f"{ours}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{gguf}.attn_v.weight", f"{ours}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{gguf}.attn_output.weight", f"{ours}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{gguf}.ffn_norm.weight", f"{ours}.post_attention_layernorm.weight", (hidden,)
        yield f"{gguf}.ffn_gate.weight", f"{ours}.mlp.gate_proj.weight", (intermediate, hidden)
        yield f"{gguf}.ffn_up.weight", f"{ours}.mlp.up_proj.weight", (intermediate, hidden)
        yield f"{gguf}.ffn_down.weight", f"{ours}.mlp.down_proj.weight", (hidden, intermediate)


def _write_weights(source: GGUFFile, family: Family, config: Mapping[str, Any], path: Path) -> None:
    """Write model.safetensors one tensor at a time: peak memory is the largest tensor, not the model."""
    gguf_names: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for gguf_name, name, shape in _names_and_shapes(config):
        if gguf_name not in source.tensors:
            raise CheckpointError(f"{source.path}: tensor '{gguf_name}' is missing")
        if source.shape(gguf_name) != shape:
            stored = source.shape(gguf_name)
            raise CheckpointError(f"{source.path}: tensor '{gguf_name}' has shape {stored}, the metadata say {shape}")
        gguf_names[name], shapes[name] = gguf_name, shape
    if unknown := sorted(set(source.tensors) - set(gguf_names.values())):
        hint = did_you_mean(unknown[0], gguf_names.values())
        raise CheckpointError(f"{source.path}: unknown tensor '{unknown[0]}' ({len(unknown)} in all){hint}")
    names = sorted(shapes)  # the order that safetensors itself writes
    permuted = {}
    if family.gguf and family.gguf.permutes_qk:
        permuted = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    with path.open("wb") as file:
        file.write(make_header({name: (DTYPE, shapes[name]) for name in names}))
        for name in names:
            tensor = source.read(gguf_names[name])
            module = name.split(".")[-2]
            if module in permuted:
                tensor = from_gguf_rows(tensor, permuted[module])
            file.write(tensor.to(DTYPE).contiguous().view(torch.uint8).numpy().data)


def _readme(source: GGUFFile, origin: str) -> str:
    name = source.get("general.name", str) or source.path.stem
    author = source.get("general.organization", str)
    license_name = source.get("general.license", str) or "unknown"
    return (
        f"---\nlicense: {license_name}\n---\n\n# {source.path.stem}\n\n"
        f"Model: {name}{f', by {author}' if author else ''}. License: {license_name}.\n\n"
        f"Converted by lorakit from `{source.path.name}`{f', {origin}' if origin else ''} "
        f"(SHA-256 `{sha256_file(source.path)}`). The weights are the quantized file's values, rounded to bfloat16: "
        "they are not the original full-precision weights.\n"
    )


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
