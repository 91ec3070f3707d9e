"""The measurement of merges: our side on a tiny run, and that all ways are in the table."""

from __future__ import annotations

from pathlib import Path

import pytest
from made import write_run_folder

from bench.adapters import merge
from lorakit.runs.recipe import load_recipe
from lorakit.runs.run import train_run


def test_the_table_of_a_trained_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_run_folder(tmp_path))
    monkeypatch.setattr(merge.peers, "has", lambda name: False)
    train_run(load_recipe("recipe.yaml", ["eval.bootstrap_samples=100"]), say=lambda text: None)
    columns, rows = merge.task_rows(Path("run"), count=2)
    assert columns == ["weights", "exact_match", "same answers"]
    assert [row[0] for row in rows] == ["base, without adapter", "adapter on 4 bits", *merge.WAYS]
    assert rows[1][-1] == 1.0


def test_targets_are_as_promised() -> None:
    assert set(merge.LEAST) == set(merge.WAYS) and set(merge.LEAST.values()) == {0.97, 0.95}
    assert 0.01 in merge.SIZES
