"""Write checkpoint folders with the shape of a Llama and random bf16 weights: 13.5 GB for Llama-7B, in about a minute.

The values repeat one pool of normal numbers (standard deviation 0.02, as in a trained model) from shifting offsets, so
that writing is as fast as the disk. The measurements that use these checkpoints do not depend on the values: reading,
quantizing, and the time and memory of a training step.

Run as: python -m bench.make_llama FOLDER [--shape llama-7b] [--layers 32]
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lorakit_kernels.cache import cache_folder
from torch import Tensor

from lorakit.checkpoints.safetensors_header import make_header
from lorakit.files import atomic_write, write_text
from lorakit.models import Decoder, DecoderConfig, resolve_model

SHARD_BYTES = 5_000_000_000
LLAMA_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LLAMA_1B = LLAMA_7B | {  # Llama-3.2-1B with its own vocabulary
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
}
SMOLLM2 = LLAMA_7B | {  # SmolLM2-135M, to vary the number of layers and the vocabulary
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100_000.0,
    "tie_word_embeddings": True,
}
SHAPES = {"llama-7b": LLAMA_7B, "llama-1b": LLAMA_1B, "smollm2": SMOLLM2}


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return tensor name -> shape, sorted by name, as in published checkpoints, without a tied head."""
    with torch.device("meta"):
        model = Decoder(DecoderConfig.from_dict(config))
    found = {name: tuple(tensor.shape) for name, tensor in sorted(model.state_dict().items())}
    if config["tie_word_embeddings"]:
        del found["lm_head.weight"]
    return found


def nbytes(config: Mapping[str, Any]) -> int:
    """Return the bytes of all tensors."""
    return sum(2 * math.prod(shape) for shape in shapes(config).values())


def make_llama(folder: Path, config: Mapping[str, Any] = LLAMA_7B, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the folder, config.json last: a folder without it is unfinished."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    room = shard_bytes
    for name, shape in shapes(config).items():
        size = 2 * math.prod(shape)
        if groups[-1] and size > room:
            groups.append({})
            room = shard_bytes
        groups[-1][name] = shape
        room -= size
    pool = (0.02 * torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))).bfloat16()
    weight_map: dict[str, str] = {}
    for index, group in enumerate(groups):
        file = f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors"
        weight_map |= dict.fromkeys(group, file)
        with atomic_write(folder / file) as part, part.open("wb") as out:
            out.write(make_header({name: (torch.bfloat16, shape) for name, shape in group.items()}))
            for name, shape in group.items():
                for values in _values(pool, name, math.prod(shape)):
                    out.write(values.view(torch.uint8).numpy().data)
    index_file = {"metadata": {"total_size": nbytes(config)}, "weight_map": weight_map}
    write_text(folder / "model.safetensors.index.json", json.dumps(index_file))
    write_text(folder / "config.json", json.dumps(config))


def model_folder(name: str) -> Path:
    """Return the checkpoint folder of a name in `SHAPES`, written into the cache on first use, or of a real model.

    Raises:
        CheckpointError: the name is none of these, nor a folder.
    """
    if name not in SHAPES:
        return resolve_model(name)
    folder = cache_folder() / "bench" / name
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        needed, free = nbytes(SHAPES[name]), shutil.disk_usage(folder).free
        if free < needed * 1.05:
            sys.exit(f"{folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} are free")
        print(f"writing {folder} ({needed / 1e9:.1f} GB, kept for the next time)", file=sys.stderr)
        make_llama(folder, SHAPES[name])
    return folder


def _values(pool: Tensor, name: str, count: int) -> Iterator[Tensor]:
    if name.endswith("norm.weight"):
        yield torch.ones(count, dtype=torch.bfloat16)
        return
    start = zlib.crc32(name.encode()) % len(pool)
    while count > 0:
        values = pool[start : start + count]
        yield values
        start, count = 0, count - len(values)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--layers", type=int, help="number of layers, instead of the shape's")
    options = parser.parse_args()
    layers = {"num_hidden_layers": options.layers} if options.layers else {}
    make_llama(options.folder, SHAPES[options.shape] | layers)
