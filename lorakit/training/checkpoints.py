"""Training checkpoints: everything a run needs to resume as if it had never stopped, without pickle.

    <output>/checkpoints/step-000040/state.safetensors    parameters, optimizer state, random state
    <output>/checkpoints/step-000040/state.json           step, fingerprint of settings and data

A checkpoint is renamed into place once it is whole, so a kill while it is written leaves the previous one.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import CheckpointError, TrainingError, listing
from ..files import atomic_folder, finite
from ..models.tokenizer.tokenizer import Tokenizer
from .optimizers import Optimizer

STATE = "state.json"


def save_checkpoint(
    folder: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    fingerprint: Any,
    progress: Mapping[str, Any],
) -> Path:
    """Write a checkpoint after `step` steps and delete the older ones.

    Args:
        folder: the folder of the run's checkpoints.
        fingerprint: what a resumed run must share with this one, as a JSON value.
        progress: the state of the run's log, as JSON values.

    A parameter that no gradient has reached yet has no optimizer state; the checkpoint lists these parameters.
    """
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    without_state = [name for name, parameter in parameters.items() if not optimizer.state.get(parameter)]
    for name, parameter in parameters.items():
        tensors[f"parameter/{name}"] = parameter.detach().cpu().contiguous()
        for key in () if name in without_state else optimizer.state_bytes(parameter.numel()):
            tensors[f"{key}/{name}"] = optimizer.state[parameter][key].cpu().contiguous()
    target = folder / f"step-{step:06d}"
    with atomic_folder(target) as part:
        save_file(tensors, part / "state.safetensors")
        state = {"step": step, "fingerprint": fingerprint, "progress": dict(progress), "without_state": without_state}
        (part / STATE).write_text(json.dumps(finite(state), allow_nan=False), encoding="utf-8")
    for old in folder.glob("step-*"):
        if old != target and _number(old) is not None:
            shutil.rmtree(old, ignore_errors=True)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first."""
    return sorted((path for path in folder.glob("step-*") if _number(path) is not None), key=_order)


def read_state(path: Path) -> dict[str, Any]:
    """Return the contents of a checkpoint's state.json.

    Raises:
        CheckpointError: it or the file of tensors beside it is missing or broken.
    """
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        int(state["step"]), dict(state["progress"]), set(state["without_state"]), state["fingerprint"]
        with safe_open(path / "state.safetensors", framework="pt"):  # compares the header with the file's size
            return dict(state)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {type(error).__name__}: {error}") from None


def newest_checkpoint(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """Return the newest checkpoint in a folder that is whole, and its state; (None, {}) if there is no checkpoint.

    Raises:
        CheckpointError: there are checkpoints, but none is whole; the error is that of the newest.
    """
    problem: CheckpointError | None = None
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, read_state(path)
        except CheckpointError as error:
            problem = problem or error
    if problem is not None:
        raise problem
    return None, {}


def other_run(path: Path, written: Any, wanted: Any) -> TrainingError:
    """Return the error that a checkpoint belongs to another run, with every difference between two fingerprints."""
    differences: list[str] = []
    if isinstance(written, Mapping) and isinstance(wanted, Mapping):
        for key in dict.fromkeys((*wanted, *written)):
            was, now = written.get(key), wanted.get(key)
            if was != now:
                hashed = str(key).startswith("the ")
                differences.append(f"{key}: not the same" if hashed else f"{key}: {was} in that run, {now} now")
    return TrainingError(
        f"{path} was written with other settings, data or adapter; resume with those, or train into another folder"
        f"{':' if differences else ''}{listing(differences)}"
    )


def on_first_day(tok: Tokenizer, outputs: Sequence[Path]) -> Tokenizer:
    """Return the tokenizer with the date of the run whose checkpoints are in one of the folders, unless it has its own.

    Warns where that changes the conversations: where their chat template asks for the date and it is another.

    Raises:
        CheckpointError: no checkpoint can be read.
    """
    found = (newest_checkpoint(output / "checkpoints") for output in outputs)
    state = next((state for path, state in found if path is not None), None)
    if state is None or tok.has_own_date:
        return tok
    first_day = date.fromisoformat(state["progress"].get("date", tok.date.isoformat()))
    if tok.is_dated and first_day != tok.date:
        warnings.warn(f"the conversations get the date on which the run began, {first_day}", stacklevel=3)
    return tok.on(first_day)


def load_checkpoint(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, fingerprint: Any
) -> tuple[int, dict[str, Any]]:
    """Restore parameters, optimizer and random state; return the step count and the saved progress.

    Raises:
        CheckpointError: a file is missing, broken, or holds other parameters.
        TrainingError: the checkpoint was written with other settings, data or adapter.
    """
    state = read_state(path)
    if state["fingerprint"] != fingerprint:
        raise other_run(path, state["fingerprint"], fingerprint)
    try:
        tensors = load_file(path / "state.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {type(error).__name__}: {error}") from None
    step, progress, without_state = int(state["step"]), dict(state["progress"]), set(state["without_state"])
    keys = {
        name: () if name in without_state else tuple(optimizer.state_bytes(parameter.numel()))
        for name, parameter in parameters.items()
    }
    expected = {f"{kind}/{name}" for name in parameters for kind in ("parameter", *keys[name])}
    if wrong := sorted((expected | {"rng"}) ^ set(tensors)):
        raise CheckpointError(f"{path} does not fit the model: {', '.join(wrong[:5])} missing or unexpected")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter/{name}"])
            if name in without_state:
                optimizer.state.pop(parameter, None)
                continue
            optimizer.state[parameter] = {key: _placed(key, tensors[f"{key}/{name}"], parameter) for key in keys[name]}
    torch.set_rng_state(tensors["rng"])
    return step, progress


def _number(path: Path) -> int | None:
    digits = path.name.removeprefix("step-")
    return int(digits) if digits.isascii() and digits.isdecimal() and path.is_dir() else None


def _order(path: Path) -> int:
    return _number(path) or 0


def _placed(key: str, value: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return a state as the optimizer made it: on the parameter's device, a moment with the parameter's strides.

    A fused update walks through parameter and moments in memory order, so a moment with other strides would update the
    wrong elements. The step count stays on the host.
    """
    if key == "step":
        return value
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
