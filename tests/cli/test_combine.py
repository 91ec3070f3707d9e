"""`lorakit combine` and `lorakit resize` on folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tolerances import assert_within, rounding
from torch import nn
from typer.testing import CliRunner

from lorakit import LoraConfig, add_adapter, save_adapter
from lorakit.adapters import read_adapter_folder
from lorakit.cli.app import app
from lorakit.errors import AdapterError, ConfigError, StorageError


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the adapters one, two and lr=2 of one model."""
    monkeypatch.chdir(tmp_path)
    for name, rank in (("one", 4), ("two", 2), ("lr=2", 3)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 12))
        add_adapter(model, LoraConfig(r=rank, init_lora_weights=False))
        save_adapter(model, tmp_path / name)
    return tmp_path


def lorakit(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None:
        raise result.exception
    return result.output


def test_combining(folders: Path) -> None:
    printed = lorakit("combine", "sum", "one=0.5", "two=-2", "lr=2")
    assert printed.startswith("linear: 0.5 x one + -2 x two + 1 x lr=2\n2 layers, ranks 9;")
    assert printed.endswith("sum: written\n")
    found = read_adapter_folder("sum").layers
    for path, weights in ((path, {"one": 0.5, "two": -2, "lr=2": 1}) for path in found):
        parts = [(read_adapter_folder(name).layers[path].update(), weight) for name, weight in weights.items()]
        # Three weighted B, rounded to fp32 in the file, over 9 ranks.
        sizes = [part.up.abs() @ part.down.abs() * abs(weight) for part, weight in parts]
        expected = sum(weight * part.dense() for part, weight in parts)
        assert_within(found[path].update().dense(), expected, rounding(9 + 3, sum(sizes)))
    printed = lorakit("combine", "pruned", "one", "two", "--method", "ties", "--density", "0.2", "--rank", "3")
    assert "ties, density 0.2: 1 x one + 1 x two\n2 layers, ranks 3;" in printed
    assert "relative error of the update: " in printed


def test_resizing(folders: Path) -> None:
    assert "2 layers, ranks 2; 128 parameters, 256 before" in lorakit("resize", "one", "small", "--rank", "2")
    assert {layer.rank for layer in read_adapter_folder("small").layers.values()} == {2}
    assert "resized to at most 200 parameters" in lorakit("resize", "one", "fit", "--parameters", "200")


@pytest.mark.parametrize("command", [("combine", "sum", "one", "two"), ("resize", "one", "sum", "--rank", "1")])
def test_what_is_there_is_replaced_only_if_asked(command: tuple[str, ...], folders: Path) -> None:
    (folders / "sum").mkdir()
    lorakit(*command)
    before = {path.name: path.read_bytes() for path in (folders / "sum").iterdir()}
    changed = ("--method", "svd", "--rank", "1") if command[0] == "combine" else ("--rank", "2")
    command = command if command[0] == "combine" else command[:3]
    with pytest.raises(StorageError, match="sum exists already; name another, or replace it with --overwrite"):
        lorakit(*command, *changed)
    assert {path.name: path.read_bytes() for path in (folders / "sum").iterdir()} == before
    lorakit(*command, *changed, "--overwrite")
    assert {path.name: path.read_bytes() for path in (folders / "sum").iterdir()} != before


def test_a_source_is_not_its_own_target_unasked(folders: Path) -> None:
    with pytest.raises(StorageError, match="one exists already"):
        lorakit("resize", "one", "one", "--rank", "1")
    lorakit("resize", "one", "one", "--rank", "1", "--overwrite")
    assert {layer.rank for layer in read_adapter_folder("one").layers.values()} == {1}


def test_errors(folders: Path) -> None:
    with pytest.raises(ConfigError, match="'one=half': expected ADAPTER=WEIGHT with a number"):
        lorakit("combine", "sum", "one=half")
    with pytest.raises(ConfigError, match="named twice"):
        lorakit("combine", "sum", "one", "one=2")
    with pytest.raises(ConfigError, match="give one of rank, energy and parameters"):
        lorakit("resize", "one", "small")
    with pytest.raises(AdapterError, match="absent"):
        lorakit("resize", "absent", "small", "--rank", "1")
    assert sorted(path.name for path in folders.iterdir()) == ["lr=2", "one", "two"]
