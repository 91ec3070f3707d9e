"""Adapters for the programs that serve them: each reads PEFT's format in its own way, and some of it silently wrong.

One file a consumer and one line in `EXPORTS`. An export changes the form, never the update: reading it by the
consumer's own rules gives scaling * B @ A of every layer. What a consumer would drop or mis-apply is refused, with the
reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import AdapterError, did_you_mean
from ..peft.folder import read_adapter_folder
from .base_config import base_of, read_base_config
from .export import Export, check_ranks
from .llama_cpp import export_llama_cpp
from .tgi import export_tgi
from .vllm import export_vllm

__all__ = ["EXPORTS", "base_of", "check_ranks", "export_adapter"]

EXPORTS: Mapping[str, Callable[[Export, Path], None]] = {
    "vllm": export_vllm,
    "tgi": export_tgi,
    "llama.cpp": export_llama_cpp,
}


def export_adapter(
    adapter: str | os.PathLike[str],
    path: str | os.PathLike[str],
    target: str,
    base: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    max_rank: int | None = None,
) -> Path:
    """Write an adapter folder in the form that a consumer reads right; needs no model.

    Args:
        adapter: a folder in PEFT's format, or a run's folder.
        path: what to write: a folder for "vllm" and "tgi", a file for "llama.cpp".
        target: a key of `EXPORTS`.
        base: the base model's folder, or the contents of its config.json; None looks where the adapter says its base
            is. "tgi" and "llama.cpp" need it: it has the number of layers, and of heads.
        dtype: of the written tensors; None keeps the adapter's, or takes float32 where that would round.
        max_rank: refuse ranks above this, such as the --max-lora-rank that vLLM is started with.

    Returns:
        `path`.

    Raises:
        AdapterError: an unknown target, a feature that the consumer would drop or mis-apply, a rank over the limit, or
            something other than such an export stands at `path`.
        CheckpointError: the adapter, or the base's config.json where it is needed, cannot be read.
        StorageError: writing failed; what stood there is untouched.
    """
    if target not in EXPORTS:
        known = ", ".join(["peft", *EXPORTS])
        raise AdapterError(f"unknown target '{target}'{did_you_mean(target, EXPORTS)} (known: {known})")
    read = read_adapter_folder(adapter)
    layers = dict(read.layers)
    check_ranks({name: layer.rank for name, layer in layers.items()}, max_rank)
    place = base if base is not None else read.config.get("base_model_name_or_path")
    EXPORTS[target](Export(read.config, layers, tuple(read.extras), lambda: read_base_config(place), dtype), Path(path))
    return Path(path)
