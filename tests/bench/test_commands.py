"""Each command has a short name, and code uses full names alone: a module that is loaded twice has two states."""

from __future__ import annotations

import ast
import json
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
# Runs every command with --help in one process, so that what all of them import is imported once.
ASK_ALL = """
import contextlib, io, json, runpy, sys
answers = {}
for command in sys.argv[1:]:
    sys.argv, out = [command, "--help"], io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        runpy.run_module(command, run_name="__main__", alter_sys=True)
    answers[command] = out.getvalue()
print(json.dumps(answers))
"""


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of everything that a file imports; the name is empty for `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (("." * node.level + (node.module or ""), alias.name) for alias in node.names)


def runs_here(source: Path) -> bool:
    """Return whether all packages that a command imports are installed: a peer's script needs that peer."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    names = {module for module, _ in imported(top)}
    return all(
        runs_here(ROOT / (name.replace(".", "/") + ".py")) if name.startswith("bench.training.sides.")
        else find_spec(name.partition(".")[0]) is not None
        for name in names
    )  # fmt: skip


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    """What each command that can run here prints of itself."""
    commands = [command for command, source in COMMANDS.items() if runs_here(source)]
    run = subprocess.run([sys.executable, "-c", ASK_ALL, *commands], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    answers: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return answers


def test_the_commands_are_those_of_the_files() -> None:
    named = {
        f"bench.{'sides.' if source.parent.name == 'sides' else ''}{source.stem}"
        for source in SOURCES
        if "if __name__ ==" in source.read_text() and source.stem != "measure"
    }
    assert set(COMMANDS) == named | {"bench.gpu"} and len(named) > 30


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_its_short_name_and_says_how_it_is_used(command: str, answers: dict[str, str]) -> None:
    found = find_spec("bench.gpu.measure" if command == "bench.gpu" else command)
    assert found is not None and found.origin == str(COMMANDS[command])
    assert command not in answers or (
        answers[command].startswith("usage: ") and f"python -m {command}" in answers[command]
    )


def test_few_commands_need_a_peer(answers: dict[str, str]) -> None:
    assert set(COMMANDS) - set(answers) <= {
        "bench.inspect_gradience", "bench.sides.held_out", "bench.sides.peft_step", "bench.sides.trl_sft"
    }  # fmt: skip


@pytest.mark.parametrize("source", [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))], ids=lambda file: file.stem)
def test_modules_are_imported_by_their_full_names(source: Path) -> None:
    for module, name in imported(ast.parse(source.read_text(encoding="utf-8"))):
        if module == "bench" and name:
            assert name in (*bench.ROOMS, "pages", "ROOMS"), f"{source.name}: from bench import {name}"
        elif module.startswith("bench."):
            assert module.split(".")[1] in (*bench.ROOMS, "pages"), f"{source.name}: {module}"
        if source.is_relative_to(ROOT / "bench"):
            assert not module.startswith("."), f"{source.name}: {module}{name}"
