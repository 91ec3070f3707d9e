"""Checkpoints: everything there and back to the bit, and every way one can be broken or not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lorakit.errors import CheckpointError, TrainingError
from lorakit.training.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from lorakit.training.optimizers import AdamW


def trained(steps: int, seed: int = 0) -> tuple[dict[str, nn.Parameter], AdamW]:
    torch.manual_seed(seed)
    parameters = {
        "a": nn.Parameter(torch.randn(3, 4)),
        "b": nn.Parameter(torch.randn(2, dtype=torch.bfloat16)),
        "x.c": nn.Parameter(torch.randn(4, 5).T),
    }
    optimizer = AdamW(parameters.values(), lr=0.1)
    for _ in range(steps):
        advance(parameters, optimizer)
    return parameters, optimizer


def advance(parameters: dict[str, nn.Parameter], optimizer: AdamW) -> None:
    optimizer.zero_grad()
    sum((p.float() ** 3).sum() for p in parameters.values()).backward()
    optimizer.step()


def saved(folder: Path, steps: int = 3, progress: dict[str, Any] | None = None) -> Path:
    return save_checkpoint(folder, steps, *trained(steps), "print", progress or {"history": []})


def refused(path: Path, error: type[Exception] = CheckpointError, fingerprint: str = "print") -> str:
    parameters, optimizer = trained(1, seed=1)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    random = torch.get_rng_state()
    with pytest.raises(error) as caught:
        load_checkpoint(path, parameters, optimizer, fingerprint)
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())
    assert torch.equal(torch.get_rng_state(), random)
    return str(caught.value)


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    parameters, optimizer = trained(3)
    torch.rand(5)
    path = save_checkpoint(tmp_path, 3, parameters, optimizer, "print", {"history": [{"loss": 0.1 + 0.2}]})
    drawn = torch.rand(3)
    others, theirs = trained(1, seed=1)
    assert load_checkpoint(path, others, theirs, "print") == (3, {"history": [{"loss": 0.1 + 0.2}]})
    assert torch.equal(torch.rand(3), drawn)
    advance(parameters, optimizer)
    advance(others, theirs)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, others[name]) and parameter.dtype == others[name].dtype
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(value, theirs.state[others[name]][key])


def test_a_parameter_that_no_gradient_has_reached(tmp_path: Path) -> None:
    def with_another(seed: int) -> tuple[dict[str, nn.Parameter], AdamW]:
        parameters, optimizer = trained(2, seed)
        parameters["unused"] = nn.Parameter(torch.randn(3))
        optimizer.add_param_group({"params": [parameters["unused"]]})
        return parameters, optimizer

    parameters, optimizer = with_another(seed=0)
    path = save_checkpoint(tmp_path, 2, parameters, optimizer, "print", {})
    others, theirs = with_another(seed=1)
    others["unused"].grad = torch.ones(3)
    theirs.step()  # here one did
    load_checkpoint(path, others, theirs, "print")
    assert torch.equal(others["unused"], parameters["unused"]) and not theirs.state.get(others["unused"])
    advance(parameters, optimizer)  # which reaches it, too
    advance(others, theirs)
    assert all(torch.equal(parameter, others[name]) for name, parameter in parameters.items())


def test_only_the_last_is_kept_and_the_order_is_that_of_the_steps(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "nowhere") == []
    for steps in (2, 10, 9):
        saved(tmp_path, steps)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000009"]
    for name in ("step-000100", "step-000020"):
        (tmp_path / name).mkdir()
    (tmp_path / ".step-000200.x.part").mkdir()
    (tmp_path / "step-notes.txt").write_text("")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000009", "step-000020", "step-000100"]


def test_writing_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    saved(tmp_path, progress={"history": [1]})
    path = saved(tmp_path, progress={"history": [2]})
    assert load_checkpoint(path, *trained(1), "print")[1] == {"history": [2]}


def test_another_fingerprint_is_refused(tmp_path: Path) -> None:
    assert "other settings, data or adapter" in refused(saved(tmp_path), TrainingError, "another")


def edit_json(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        file = path / "state.json"
        file.write_text(json.dumps(change(json.loads(file.read_text()))))

    return edit


def truncate(name: str, keep: float) -> Callable[[Path], None]:
    def cut(path: Path) -> None:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: int(keep * len(content))])

    return cut


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "state.json").unlink(),
        lambda path: (path / "state.safetensors").unlink(),
        *(truncate(name, keep) for name in ("state.json", "state.safetensors") for keep in (0, 0.1, 0.5, 0.99)),
        edit_json(lambda state: []),
        edit_json(lambda state: {"step": 3}),
        edit_json(lambda state: state | {"step": "three"}),
        edit_json(lambda state: state | {"progress": None}),
        lambda path: (path / "state.json").write_bytes(b"\xff\xfe"),
    ],
    ids=lambda _: None,
)
def test_damage_is_named_and_nothing_is_restored(damage: Callable[[Path], None], tmp_path: Path) -> None:
    path = saved(tmp_path)
    damage(path)
    assert f"cannot read the checkpoint {path}" in refused(path)


@pytest.mark.parametrize("lost", ["rng", "parameter/a", "exp_avg/x.c", "step/b"])
def test_missing_and_unexpected_tensors(lost: str, tmp_path: Path) -> None:
    path = saved(tmp_path)
    tensors = load_file(path / "state.safetensors")
    save_file(
        {"stray" if name == lost else name: tensor for name, tensor in tensors.items()}, path / "state.safetensors"
    )
    message = refused(path)
    assert lost in message and "stray" in message


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    before = saved(tmp_path)
    script = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from torch import nn\n"
        "from lorakit.errors import LorakitError\n"
        "from lorakit.training.checkpoints import save_checkpoint\n"
        "from lorakit.training.optimizers import AdamW\n"
        "weight = nn.Parameter(torch.randn(100, 100))\n"
        "optimizer = AdamW([weight])\n"
        "weight.sum().backward(); optimizer.step()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # EFBIG instead of ENOSPC\n"
        "try:\n"
        "    save_checkpoint(Path(sys.argv[1]), 9, {'weight': weight}, optimizer, '', {})\n"
        "except LorakitError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.startswith("StorageError cannot write"), done.stderr
    assert list(tmp_path.iterdir()) == [before]
    load_checkpoint(before, *trained(1), "print")
