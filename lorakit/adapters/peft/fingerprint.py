"""The identity of a base model: its name, and 64 hex digits that quantization and another dtype do not change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..attach.targeting import unwrapped


def base_names(model: nn.Module) -> Iterator[str]:
    """Yield the folder or name from which a model, lorakit's or one of transformers, was loaded; it may be ""."""
    for name in (getattr(model, "folder", None), getattr(getattr(model, "config", None), "_name_or_path", None)):
        if name is not None:
            yield str(name)


def base_fingerprint(model: nn.Module) -> str | None:
    """Return a hash of a model's vectors (norms and biases) with their names, or None if it has no vector.

    Vectors are never quantized, and values that a checkpoint holds in bf16 are the same in bf16 and in fp32. So the
    4-bit and the 16-bit model of one checkpoint have the same fingerprint. Adapters do not count.
    """
    digest, count = hashlib.sha256(), 0
    for name, vector in _vectors(model):
        digest.update(f"{name} {len(vector)} ".encode())
        digest.update(vector.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
        count += 1
    return digest.hexdigest() if count else None


def _vectors(module: nn.Module, path: str = "") -> Iterator[tuple[str, Tensor]]:
    base = unwrapped(module)
    for name in ("weight", "bias"):
        parameter = base._parameters.get(name)
        if parameter is not None and parameter.ndim == 1 and parameter.is_floating_point():
            yield f"{path}{name}", parameter
    for name, child in base.named_children():
        yield from _vectors(child, f"{path}{name}.")
