"""train.jsonl: a valid line a step, flushed at once, cut back to the checkpoint on resume; and what is printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import StorageError
from lorakit.training.runlog import RunLog


def row(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step, "steps": 40, "loss": 2.5, "lr": 1e-4, "grad_norm": 0.5, "trained_tokens": 7, "tokens": 20,
        "step_seconds": 0.5, "seconds": 0.5 * step, "peak_rss_mb": 900.0, **more,
    }  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_step_is_on_disk_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "run" / "train.jsonl"
    with RunLog(path, 40, [], show=False) as log:
        assert lines(path) == []
        for step in (1, 2, 3):
            log.step(row(step))
            assert lines(path) == [row(i) for i in range(1, step + 1)] == log.rows
            assert path.read_text().endswith("}\n")


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(1, 6)) + '{"step": 6, "lo', encoding="utf-8")
    with RunLog(path, 40, [row(1), row(2)], show=False) as log:
        log.step(row(3))
    assert [line["step"] for line in lines(path)] == [1, 2, 3]


def test_an_exception_passes_and_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    with pytest.raises(KeyboardInterrupt), RunLog(path, 40, [], show=True) as log:
        log.step(row(1))
        raise KeyboardInterrupt
    assert lines(path) == [row(1)]


def test_a_tenth_of_the_steps_are_printed_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(None, 40, [], show=True) as log:
        for step in range(1, 41):
            log.step(row(step, **({"eval_loss": 1.25} if step == 40 else {})))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 10
    assert printed[0] == "train 4/40  loss 2.500  40 tok/s  900 MiB peak  18 s left"
    assert printed[-1].startswith("train 40/40") and "held-out loss 1.250" in printed[-1]


def test_nothing_is_printed_or_written_where_nothing_is_asked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with RunLog(None, 1, [], show=False) as log:
        log.step(row(1, step_seconds=0.0))
    captured = capsys.readouterr()
    assert (captured.out, captured.err, list(tmp_path.iterdir())) == ("", "", [])


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        RunLog(tmp_path / "file" / "train.jsonl", 1, [], show=False)
