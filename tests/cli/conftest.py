"""A run in small: a checkpoint folder, a data set and a recipe, in a folder of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from made import write_run_folder


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with model/, train.jsonl, eval.jsonl and recipe.yaml, whose run goes to run/."""
    monkeypatch.chdir(tmp_path)
    return write_run_folder(tmp_path)
