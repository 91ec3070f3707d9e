"""`lorakit plan` on a real model's configuration."""

from __future__ import annotations

import re
import subprocess
import sys

MODEL = "smollm2-135m-instruct"


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from lorakit.cli import main; main()", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_says_what_it_takes_and_what_would_make_it_fit() -> None:
    run = plan(MODEL, "--length", "512", "--set", "batch_size=2", "--memory", "850MiB")
    assert run.returncode == 0, run.stderr
    for part in (
        "weights",
        "activations",
        "together",
        "4,884,480 of",
        "It does not fit 850 MiB",
    ):
        assert part in run.stdout
    suggested = re.findall(r"^  (.*): (\d+) MiB", run.stdout, re.MULTILINE)
    assert any("checkpointing=" in changes for changes, _ in suggested)
    assert all(int(reached) <= 850 for _, reached in suggested)
    assert "It fits 3.73 GiB" in plan(MODEL, "--length", "512", "--memory", "4GB").stdout


def test_cost() -> None:
    run = plan(
        MODEL, "--length", "512", "--dataset-tokens", "1000000", "--flops-per-second", "1e12", "--price-per-hour", "2"
    )
    assert "1,000,000 tokens: at least" in run.stdout and "at that price" in run.stdout


def test_wrong_arguments_are_named() -> None:
    for arguments, message in (
        (("no-such-model",), "no-such-model"),
        ((MODEL, "--set", "batch_size"), "expected KEY=VALUE"),
        ((MODEL, "--set", "batch=3"), "batch"),
        ((MODEL, "--memory", "much"), "'much' is not a size"),
        ((MODEL, "--memory", "10MB"), "nothing fits"),
    ):
        run = plan(*arguments)
        assert run.returncode == 1 and message in run.stderr, run.stderr
        assert "Traceback" not in run.stderr
