"""Adapters for the programs that serve them: each reads PEFT's format in its own way, and some read parts of it wrong.

Each program, or consumer, has one file and one line in `EXPORTS`. An export changes the form, never the update: read by
the consumer's own rules, it gives scaling * B @ A in every layer. Features that a consumer would drop or mis-apply are
refused, with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.checkpoint import INDEX_FILE, WEIGHTS_FILE, Checkpoint
from ...errors import AdapterError, did_you_mean
from ..peft.fingerprint import check_checkpoint
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
    """Write an adapter folder in the form that a consumer reads correctly; it needs no model.

    Args:
        adapter: a folder in PEFT's format, or a run's folder.
        path: where to write: a folder for "vllm" and "tgi", a file for "llama.cpp".
        target: a key of `EXPORTS`.
        base: the base model's folder, or the contents of its config.json; None takes the folder that the adapter names.
            "tgi" and "llama.cpp" need it for the number of layers and of heads.
        dtype: of the written tensors; None keeps the adapter's, or takes float32 where that would round.
        max_rank: refuse ranks above this, such as vLLM's --max-lora-rank.

    Returns:
        `path`.

    Raises:
        AdapterError: the target is unknown, the consumer would drop or mis-apply a feature, a rank is over the limit,
            or `path` holds something other than such an export.
        CheckpointError: the adapter, or the base's config.json where it is needed, cannot be read; or the adapter was
            trained on another base.
        StorageError: writing failed; whatever was at `path` is untouched.
    """
    if target not in EXPORTS:
        known = ", ".join(["peft", *EXPORTS])
        raise AdapterError(f"unknown target '{target}'{did_you_mean(target, EXPORTS)} (known: {known})")
    folder = read_adapter_folder(adapter)
    layers = dict(folder.layers)
    check_ranks({name: layer.rank for name, layer in layers.items()}, max_rank)
    source = base if base is not None else folder.config.get("base_model_name_or_path")
    if isinstance(base, str | os.PathLike) and any(
        (Path(base) / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE)
    ):
        check_checkpoint(Checkpoint(base), folder.base, layers, str(folder.folder))
    export = Export(folder.config, layers, tuple(folder.extras), lambda: read_base_config(source), dtype)
    EXPORTS[target](export, Path(path))
    return Path(path)
