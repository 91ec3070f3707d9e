"""Targets, tables, JSON files and the line that says what was measured on."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from bench.harness.plot import Picture
from bench.harness.report import (
    MANY,
    NOT_INSTALLED,
    Target,
    arguments,
    command,
    finish,
    in_words,
    machine,
    markdown,
    milliseconds,
    ratio,
)  # fmt: skip
from bench.harness.timing import medians

COLUMNS = ["weight", "ours", "theirs", "ratio"]
ROWS = [["2 x 2", 0.123456, NOT_INSTALLED, None], ["4 [bold] 4", 1234.5678, 2.0, 3]]


def options(tmp_path: Path, **values: object) -> argparse.Namespace:
    return argparse.Namespace(**{"check": False, "json": tmp_path / "figures.json", "plot": None} | values)


@pytest.mark.parametrize(
    ("value", "limit", "at_least", "met"),
    [
        (1.0, 1.0, False, True), (1.001, 1.0, False, False), (0.0, 1.0, False, True),
        (1.0, 1.0, True, True), (0.999, 1.0, True, False), (9.0, 1.0, True, True),
        (math.nan, 1.0, True, False), (math.nan, 1.0, False, False), (math.inf, 1.0, False, False),
    ],
)  # fmt: skip
def test_targets(value: float, limit: float, at_least: bool, met: bool) -> None:
    assert Target("time", value, limit, at_least).met is met


def test_check_fails_where_one_target_is_missed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets = [Target("a", 1.0, 2.0), Target("b", 3.0, 2.0)]
    finish(options(tmp_path, check=True), "t", COLUMNS, ROWS, targets[:1])
    finish(options(tmp_path), "t", COLUMNS, ROWS, targets)
    with pytest.raises(SystemExit) as exit:
        finish(options(tmp_path, check=True), "t", COLUMNS, ROWS, targets)
    assert exit.value.code == 1
    assert "MISSED b: 3 (at most 2)" in capsys.readouterr().out
    assert [target["met"] for target in json.loads((tmp_path / "figures.json").read_text())["targets"]] == [True, False]


def test_of_many_targets_only_the_missed_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets = [Target(f"figure {number}", float(number), MANY - 1) for number in range(MANY + 1)]
    finish(options(tmp_path), "t", COLUMNS, ROWS, targets)
    printed = capsys.readouterr().out
    assert f"MISSED figure {MANY}:" in printed and "figure 1:" not in printed
    assert f"{MANY} of {MANY + 1} targets are met" in printed


def test_the_json_file_holds_all_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = Picture("milliseconds")
    picture.add("2 x 2", {"ours": 0.001, "copy": 0.002}, ("ours", "theirs"), ("copy",))
    finish(options(tmp_path), "title", COLUMNS, ROWS, [Target("a", 1.0, 2.0)], picture)
    read = json.loads((tmp_path / "figures.json").read_text())
    assert read["columns"] == COLUMNS and [list(row.values()) for row in read["rows"]] == ROWS
    assert Picture(**read["picture"]) == picture
    assert picture.bars == {"2 x 2": {"ours": 1.0}} and picture.marks == {"2 x 2": {"copy": 2.0}}
    assert read["targets"] == [{"name": "a", "value": 1.0, "limit": 2.0, "at_least": False, "met": True}]
    printed = capsys.readouterr().out
    assert "0.1235" in printed and "1,235" in printed and "4 [bold] 4" in printed  # nothing is taken for markup


def test_the_machine_is_named_with_date_and_versions() -> None:
    found = machine()
    assert found["torch"] == torch.__version__ and found["cores"] >= 1 and found["processor"]
    line = in_words(found)
    assert str(found["date"]) in line and f"torch {torch.__version__}" in line and "bitsandbytes" in line


def test_the_command_leaves_out_where_results_go(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "/x/bench/kernels/decode.py",
        "--rounds",
        "3",
        "--json",
        "a.json",
        "--plot=b.svg",
        "--check",
        "--only",
        "a b",
    ]
    monkeypatch.setattr(sys, "argv", words)
    assert command() == "python -m bench.decode --rounds 3 --only 'a b'"


def test_the_command_of_a_room_is_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/x/bench/gpu/__main__.py", "--small"])
    assert command() == "python -m bench.gpu --small"


def test_a_plot_is_an_option_only_of_what_has_a_picture() -> None:
    assert "--plot" not in arguments("x").format_help() and "--plot" in arguments("x", plots=True).format_help()


def test_a_table_in_markdown() -> None:
    lines = markdown(["a|b", "n"], [["x|y", 1.23456], ["z", None]]).splitlines()
    assert lines == ["| a|b | n |", "| --- | ---: |", r"| x\|y | 1.235 |", "| z |  |"]


def test_what_is_not_installed() -> None:
    seen = {"ours": 0.5, "theirs": 2.0}
    assert milliseconds(seen, "ours") == 500.0 and milliseconds(seen, "torchao") == NOT_INSTALLED
    assert ratio(seen, "theirs", "ours") == 4.0 and ratio(seen, "torchao", "ours") is None


def test_calls_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    seen = medians({name: lambda name=name: order.append(name) for name in "ab"}, rounds=3)
    assert "".join(order) == "ab" * 4 and all(seconds > 0 for seconds in seen.values())
