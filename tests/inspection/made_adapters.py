"""Adapter folders and base checkpoints made to measure, with what they hold known."""

import json
import re

import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."


def write_adapter(folder, factors, scaling=1.0, **config):
    """Write path -> (B, A) as a PEFT folder; ranks are read off A."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, (b, a, *magnitude) in factors.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = b.contiguous()
        if magnitude:
            tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = magnitude[0].contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    ranks = {re.escape(path): a.shape[0] for path, (_, a, *_) in factors.items()}
    values = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "rank_pattern": ranks}
    values["alpha_pattern"] = {path: scaling * rank for path, rank in ranks.items()}
    (folder / "adapter_config.json").write_text(json.dumps(values | config))
    return folder


def write_base(folder, weights):
    """Write path -> (out, in) as a checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"{path}.weight": weight.contiguous() for path, weight in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def gaussian(out, into, rank, seed=0, dtype=torch.float32):
    """Random B (out, rank) and A (rank, in)."""
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    a = torch.randn(rank, into, generator=generator, dtype=torch.float64)
    return b.to(dtype), a.to(dtype)


def orthonormal(rows, columns, seed=0):
    """Random orthonormal columns, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q
