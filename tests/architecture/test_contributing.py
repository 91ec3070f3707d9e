"""CONTRIBUTING's section "Where things go" is right: every path, table, class and function that it names is there."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import pytest

import lorakit

ROOT = Path(__file__).parents[2]
PACKAGES = {"lorakit": ROOT, "kernels": ROOT / "kernels"}
SECTION = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Where things go\n")[1].split("\n## ")[0]
OTHER_CODE = ("lorakit data build", "(settings, outputs, references) -> one score per row")  # neither path nor name
KINDS = {
    found[1]: found[0] for found in re.finditer(r"^- \*\*(.+?)\*\*.*?(?=^- \*\*|\Z)", SECTION, re.MULTILINE | re.DOTALL)
}


def code(text: str) -> list[str]:
    """What stands between backticks."""
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", text)]


def paths(text: str) -> list[str]:
    linked = re.findall(r"\]\(([^)]+)\)", text)
    return linked + [name for name in code(text) if re.fullmatch(r"[\w./-]+/[\w./-]*", name)]


def tables(text: str) -> list[str]:
    return [name for name in code(text) if re.fullmatch(r"[A-Z]+(_[A-Z]+)*", name)]


def modules(path: str) -> Iterator[ModuleType]:
    """Import a file of the library, or a package and the files in it."""
    if path.split("/")[0] not in PACKAGES or not (path.endswith((".py", "/"))):
        return
    relative = (ROOT / path).relative_to(PACKAGES[path.split("/")[0]]).with_suffix("")
    module = importlib.import_module(".".join(relative.parts).removesuffix(".__init__"))
    yield module
    for found in pkgutil.iter_modules(getattr(module, "__path__", [])):
        yield importlib.import_module(f"{module.__name__}.{found.name}")


def test_the_floors_are_the_folders_of_the_library() -> None:
    (diagram,) = re.findall(r"(?:^    .*\n)+", SECTION, re.MULTILINE)
    floors = re.split(r"\s*(?:->|,)\s*", diagram.strip())
    folders = {folder.name for folder in (ROOT / "lorakit").iterdir() if (folder / "__init__.py").exists()}
    assert sorted(floors) == sorted({"kernels", *folders})


def test_every_kind_is_there() -> None:
    assert len(KINDS) == SECTION.count("\n- ") == 11


@pytest.mark.parametrize("path", sorted(set(paths(SECTION))))
def test_every_path_exists(path: str) -> None:
    found = ROOT / path
    assert found.is_dir() if path.endswith("/") else found.is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_is_in_the_files_beside_it(kind: str) -> None:
    """Each table, class and function is in a file that the same paragraph names, or is a public name of lorakit."""
    text = KINDS[kind]
    places = [lorakit, *(module for path in paths(text) for module in modules(path))]
    assert len(places) > 1
    for name in code(text):
        called = re.fullmatch(r"@?(\w+)(?:\((\w+)=\.\.\.\))?", name)
        if name in (*paths(text), *OTHER_CODE):
            continue
        assert called is not None, name
        found = next((getattr(place, called[1]) for place in places if hasattr(place, called[1])), None)
        assert found is not None, name
        if called[2]:
            assert called[2] in inspect.signature(found).parameters


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "An operation"])
def test_every_table_has_an_example_in_the_gate(kind: str) -> None:
    """The table is defined where the paragraph says, and tests/test_extending.py adds an entry to it by one line."""
    (table,) = tables(KINDS[kind])
    places = [module for path in paths(KINDS[kind]) for module in modules(path)]
    assert any(isinstance(vars(place).get(table), Mapping) for place in places)
    source = ast.parse((ROOT / "tests" / "test_extending.py").read_text(encoding="utf-8"))
    calls = [ast.unparse(node) for node in ast.walk(source) if isinstance(node, ast.Call)]
    assert any(call.startswith(f"register({table}, ") for call in calls)
