"""Write a checkpoint folder with the shape of Llama-7B and random bf16 weights: 13.5 GB in shards, in a minute or so.

The values repeat one pool of normal numbers (standard deviation 0.02, as in a trained model) from shifting offsets, so
that writing is as fast as the disk. What is measured with it, reading and quantizing, does not depend on the values.

Run as: python -m bench.make_llama FOLDER [--layers 32]
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.files import atomic_write, write_text
from lorakit.models import Decoder, DecoderConfig
from lorakit.models.safetensors_header import make_header

SHARD_BYTES = 5_000_000_000
CONFIG: dict[str, Any] = {
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


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return tensor name -> shape, sorted by name, as in published checkpoints."""
    with torch.device("meta"):
        model = Decoder(DecoderConfig.from_dict(CONFIG | {"num_hidden_layers": layers}))
    return {name: tuple(tensor.shape) for name, tensor in sorted(model.state_dict().items())}


def nbytes(layers: int) -> int:
    """Return the bytes of all tensors."""
    return sum(2 * math.prod(shape) for shape in shapes(layers).values())


def make_llama(folder: Path, layers: int = CONFIG["num_hidden_layers"], shard_bytes: int = SHARD_BYTES) -> None:
    """Write the folder; config.json comes last, so that one without it is known to be unfinished."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    room = shard_bytes
    for name, shape in shapes(layers).items():
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
    index_file = {"metadata": {"total_size": nbytes(layers)}, "weight_map": weight_map}
    write_text(folder / "model.safetensors.index.json", json.dumps(index_file))
    write_text(folder / "config.json", json.dumps(CONFIG | {"num_hidden_layers": layers}))


def _values(pool: Tensor, name: str, count: int) -> Iterator[Tensor]:
    if name.endswith("norm.weight"):
        yield torch.ones(count, dtype=torch.bfloat16)
        return
    start = zlib.crc32(name.encode()) % len(pool)
    while count > 0:
        part = pool[start : start + count]
        yield part
        start, count = 0, count - len(part)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    options = parser.parse_args()
    make_llama(options.folder, options.layers)
