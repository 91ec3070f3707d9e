"""Write an adapter folder with the shape of one for Llama-70B, rank 64 on all linear layers: 3.3 GB of fp32.

The values repeat one pool of normal numbers from shifting offsets, as in bench.make_llama. The time of a decomposition
does not depend on them.

Run as: python -m bench.make_adapter FOLDER [--layers 80] [--rank 64]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from lorakit.checkpoints.safetensors_header import make_header
from lorakit.files import atomic_folder

HIDDEN, KEYS, INNER = 8192, 1024, 28672
MODULES = {  # (out, in)
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def make_adapter(folder: Path, layers: int = 80, rank: int = 64) -> None:
    """Write the folder, whole or not at all."""
    pool = torch.randn(INNER * rank + 4099, generator=torch.Generator().manual_seed(0)) * 0.02
    shapes: dict[str, tuple[int, int]] = {}
    for number in range(layers):
        for module, (out, into) in MODULES.items():
            path = f"base_model.model.model.layers.{number}.{module}"
            shapes |= {f"{path}.lora_A.weight": (rank, into), f"{path}.lora_B.weight": (out, rank)}
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank,
        "target_modules": [name.split(".")[1] for name in MODULES],
    }  # fmt: skip
    with atomic_folder(folder) as part:
        (part / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        with open(part / "adapter_model.safetensors", "wb") as file:
            file.write(make_header({name: (torch.float32, shape) for name, shape in shapes.items()}))
            for number, (rows, columns) in enumerate(shapes.values()):
                start = number % 4099
                file.write(pool[start : start + rows * columns].numpy().data)


def main() -> None:
    """Write the adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--rank", type=int, default=64)
    options = parser.parse_args()
    make_adapter(options.folder, options.layers, options.rank)


if __name__ == "__main__":
    main()
