"""`save_adapter`: one adapter of a model, written for whoever is to read it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import nn

from .adapter_folder import read_adapter_folder
from .exports import base_of, check_ranks, export_adapter
from .peft_files import save_peft_folder


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    target: str = "peft",
    dtype: torch.dtype | None = None,
    max_rank: int | None = None,
) -> Path:
    """Write one adapter for a consumer; whole, or not at all.

    Args:
        path: an adapter folder, for "llama.cpp" a GGUF file; one that stands there is replaced.
        target: "peft" (which lorakit and most libraries read), "vllm", "tgi" or "llama.cpp". These three apply one
            setting of the scale to all layers, so that scales go into B; what they cannot serve is refused.
        dtype: of the written tensors; None keeps the adapter's, or takes float32 where an export would round.
        max_rank: refuse ranks above this, such as the --max-lora-rank that vLLM is started with.

    Returns:
        `path`.

    Raises:
        AdapterError: no adapter of that name, an unknown target, something that the target cannot serve, or the path
            holds something that is not an adapter.
        StorageError: writing failed; what stood there is untouched.
    """
    if target == "peft" and max_rank is None:
        return save_peft_folder(model, path, name, dtype)
    with tempfile.TemporaryDirectory() as folder:  # the exports read a folder, so that there is one way for both
        written = save_peft_folder(model, Path(folder) / "adapter", name)
        if target != "peft":
            return export_adapter(written, path, target, base_of(model), dtype, max_rank)
        check_ranks({module: layer.rank for module, layer in read_adapter_folder(written).layers.items()}, max_rank)
    return save_peft_folder(model, path, name, dtype)
