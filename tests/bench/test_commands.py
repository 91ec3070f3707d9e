"""Each command has a short name, and code uses full names alone: a module that is loaded twice has two states."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import bench

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "bench").rglob("*.py"))
RUN_AS = re.compile(r"^Run as: python -m (bench[\w.]+)", re.MULTILINE)
COMMANDS = {match[1]: source for source in SOURCES if (match := RUN_AS.search(source.read_text()))}
NEEDS = {"bench.inspect_gradience": "gradience"}  # which has an environment of its own


def test_the_commands_are_those_of_the_files() -> None:
    named = {
        f"bench.{'sides.' if source.parent.name == 'sides' else ''}{source.stem}"
        for source in SOURCES
        if "if __name__ ==" in source.read_text() and source.stem != "measure"
    }
    assert set(COMMANDS) == named | {"bench.gpu"} and len(named) > 30


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_how_it_is_used(command: str) -> None:
    if command in NEEDS and not find_spec(NEEDS[command]):
        found = find_spec(command)
        assert found is not None and found.origin == str(COMMANDS[command])
        return
    run = subprocess.run(
        [sys.executable, "-m", command, "--help"], cwd=ROOT, env=os.environ | {"COLUMNS": "120"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("usage: ") and f"python -m {command}" in run.stdout


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of everything that a file imports; the name is empty for `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (("." * node.level + (node.module or ""), alias.name) for alias in node.names)


@pytest.mark.parametrize("source", [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))], ids=lambda file: file.stem)
def test_modules_are_imported_by_their_full_names(source: Path) -> None:
    for module, name in imported(ast.parse(source.read_text(encoding="utf-8"))):
        if module == "bench" and name:
            assert name in (*bench.ROOMS, "pages", "ROOMS"), f"{source.name}: from bench import {name}"
        elif module.startswith("bench."):
            assert module.split(".")[1] in (*bench.ROOMS, "pages"), f"{source.name}: {module}"
        if source.is_relative_to(ROOT / "bench"):
            assert not module.startswith("."), f"{source.name}: {module}{name}"
