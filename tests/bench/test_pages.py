"""The page of the measurements is written from their JSON files, and from nothing else."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest

from bench import pages
from bench.harness.plot import Picture
from bench.harness.report import Target, finish

SHAPES = ("2048 x 2048", "4096 x 4096")


SECTIONS = [(name, section) for name, page in pages.PAGES.items() for section in page.sections]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a JSON file of each measurement, as `finish` writes them."""
    for _, section in SECTIONS:
        picture = Picture("milliseconds", {shape: {"lorakit": 1.5, "torchao": 40.0} for shape in SHAPES})
        column = section.shown[0] if section.shown else "weight"
        names = ("sm_80", section.shown[1][0]) if section.shown else SHAPES
        options = argparse.Namespace(check=False, json=tmp_path / f"{section.file}.json")
        targets = [Target("fast enough", 1.0, 2.0), Target("small enough", 5.0, 2.0)]
        finish(options, f"of {section.file}", [column, "ms"], [[name, 1.5] for name in names], targets, picture)
    return tmp_path


def test_a_section_has_description_command_table_picture_and_machine(folder: Path) -> None:
    pages.write(folder)
    for page, section in SECTIONS:
        text = (folder / f"{page}.md").read_text()
        part = text.partition(f"## {section.title}\n")[2].partition("\n## ")[0]
        assert (pages.description(section.module) in part) != bool(section.name) and "Run as" not in part
        assert "    python -m bench." in part and f"[{section.file}.json]({section.file}.json)" in part
        assert f"![of {section.file}]({section.file}.svg)" in part and "torch " in part
        assert "1 of 2 targets are met. Missed: small enough (5, not 2)." in part
        assert section.draws or (folder / f"{section.file}.svg").stat().st_size > 5_000
    kernels = (folder / "kernels.md").read_text()
    assert "| 4096 x 4096 | 1.5 |" in kernels
    assert "| sm_90 | 1.5 |" in kernels and "| sm_80 |" not in kernels  # of the long table only what is shown


def test_the_same_figures_give_the_same_pages(folder: Path) -> None:
    pages.write(folder)
    first = {file.name: file.read_bytes() for file in folder.iterdir()}
    pages.write(folder)
    assert first == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_missing_file_is_named_with_the_command_that_makes_it(folder: Path) -> None:
    (folder / "train_step_1b.json").unlink()
    expected = r"train_step_1b\.json is missing.* python -m bench\.train_step --model llama-1b .*--json"
    with pytest.raises(FileNotFoundError, match=expected):
        pages.write(folder)
    assert not list(folder.glob("*.md")) and not list(folder.glob("*.svg"))


def test_unknown_measurements_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["pages", "--run", "--only", "decode,dekode", "--folder", str(folder)])
    with pytest.raises(SystemExit) as exit:
        pages.main()
    assert exit.value.code == 2 and "no measurement is called dekode (known: dequantize," in capsys.readouterr().err


def test_the_pages_in_the_docs_are_those_of_their_figures(tmp_path: Path) -> None:
    docs = Path(pages.__file__).parents[1] / "docs" / "benchmarks"
    for file in docs.glob("*.json"):
        shutil.copy(file, tmp_path)
    pages.write(tmp_path)
    for page in pages.PAGES:
        assert (tmp_path / f"{page}.md").read_text() == (docs / f"{page}.md").read_text()


def test_the_explanations_quote_the_figures(tmp_path: Path) -> None:
    docs = Path(pages.__file__).parents[1] / "docs"
    for name, explanation in pages.EXPLAINED.items():
        measured, page = tmp_path / f"{name}.json", tmp_path / f"{explanation}.md"
        shutil.copy(docs / "benchmarks" / measured.name, measured)
        shutil.copy(docs / "explanation" / page.name, page)
        pages.fill(measured, page)
        assert page.read_text() == (docs / "explanation" / page.name).read_text()
