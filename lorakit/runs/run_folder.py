"""The folder of a run: what it holds, who may write to it, and how one run takes the place of another.

A folder holds one run: recipe, adapter, log and metrics belong together. A new run in a folder that holds one works in
a hidden folder beside it, ".NAME.new". Once it is whole, the two folders exchange their names in one step. Whatever
else the user keeps in the folder stays there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data import Record
from ..errors import ConfigError, LorakitError, StorageError, TrainingError, listing
from ..files import exchange, read_json_object, write_text
from ..locks import claimed, locked
from ..training.output import CHECKPOINTS, LOG, OutputFolder, has_steps
from .recipe import Recipe, input_files, load_recipe, save_recipe

RECIPE, CHAT, ADAPTER, METRICS = "recipe.yaml", "chat.json", "adapter", "metrics.json"
FILES = (
    RECIPE, CHAT, LOG, "probes.jsonl", "probes.parquet", "predictions.jsonl", METRICS, "report.html", "report.md",
)  # fmt: skip
FOLDERS = (ADAPTER, CHECKPOINTS, "tensorboard")


class RunFolder(OutputFolder):
    """The folder of a recipe's run, while the run goes on.

    Args:
        recipe: the run.
        say: receives one line where something is worth knowing.
        resume: continue the run that the folder holds.
        overwrite: replace it, once the new one is whole.

    Attributes:
        output: the recipe's folder.
        work: where the run writes: `output`, or the hidden folder beside it.
        chat: how the run's chats begin, from `chat_of`; the run keeps it in chat.json.
    """

    def __init__(self, recipe: Recipe, say: Callable[[str], None], resume: bool, overwrite: bool) -> None:
        super().__init__(recipe.output)
        if resume and overwrite:
            raise ConfigError("a run is either resumed or overwritten, not both")
        self.recipe, self.output, self.work = recipe, recipe.output, recipe.output
        self.chat: dict[str, Any] = {}
        self._say, self._resume, self._overwrite = say, resume, overwrite
        self._real = recipe.output  # without links, once it is claimed
        self._locks = contextlib.ExitStack()

    @property
    def staged(self) -> Path:
        """The hidden folder beside the run's, for a run that is to replace it."""
        return self._real.with_name(f".{self._real.name}.new")

    @property
    def folders(self) -> Sequence[Path]:
        return [self.staged, self.output]

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes out, and refuse what must not be touched.

        Raises:
            StorageError: another process writes there, the folder holds a run that is neither to be resumed nor
                overwritten, or something that is not a run's, or it cannot be written.
        """
        with claimed(self.output), self._locks:
            self._real = Path(os.path.realpath(self.output))
            self._check()
            yield

    def begin(self, checkpoint: Path | None) -> Path:
        try:
            if checkpoint is not None:
                is_there = checkpoint.parent.parent == self.output
                if is_there and (self.output / METRICS).exists():
                    self._stage(copied=True)  # a finished run stays as it is until its successor is finished
                elif not is_there:
                    self._stage(copied=False, emptied=False)
            elif self._resume and has_steps(self.staged):
                self._stage(copied=False, emptied=False)
            elif self._overwrite and holds_run(self.output, self.recipe):
                self._stage(copied=False)
        except OSError as error:
            raise StorageError(f"cannot write {self.staged}: {error.strerror or error}") from error
        self.keep_earlier_log()
        if _saved_recipe(self.work) != self.recipe:
            save_recipe(self.recipe, self.work / RECIPE)
        write_text(self.work / CHAT, json.dumps(self.chat, ensure_ascii=False) + "\n")
        return self.work

    def find_checkpoint(self, fingerprint: Mapping[str, Any]) -> Path | None:
        try:
            return super().find_checkpoint(fingerprint)
        except TrainingError as error:
            with_checkpoint = [folder for folder in self.folders if any((folder / CHECKPOINTS).glob("step-*"))]
            old = _saved_recipe(with_checkpoint[0]) if with_checkpoint else None
            changes = differences(old, self.recipe) if old is not None else []
            named = [change for change in changes if change.startswith(("model.", "data."))]
            raise TrainingError(f"{error}{listing(named)}") from None

    def begin_anew(self, earlier_log: Path | None) -> None:
        """Say that there is nothing to resume.

        Raises:
            StorageError: the folder holds a run that is finished, or has no log.
            TrainingError: the folder holds steps of another recipe.
        """
        folder = self.output if earlier_log is None else earlier_log.parent
        if (folder / METRICS).exists() or (earlier_log is None and holds_run(folder, self.recipe)):
            raise StorageError(
                f"{folder} has no checkpoint to resume from, and {state_of(folder)}; replace it with --overwrite, or "
                "name another folder with --set output=..."
            )
        old = _saved_recipe(folder)
        if earlier_log is not None and old is not None and (changes := differences(old, self.recipe)):
            raise TrainingError(
                f"{folder} has no checkpoint to resume from, and its recipe is another:{listing(changes)}\n"
                "replace that run with --overwrite, or name another folder with --set output=..."
            )
        self._say(self.nothing_to_resume(earlier_log))

    def publish(self) -> None:
        """Put the finished run in place of the earlier one, if it has been written beside it.

        Raises:
            StorageError: that is not possible; the message says where the run is.
        """
        if self.work == self.output:
            return
        old = self._real.with_name(f".{self._real.name}.replaced")
        try:
            shutil.copytree(
                self._real, self.staged, symlinks=True, dirs_exist_ok=True, copy_function=_link,
                ignore=lambda folder, names: set(filter(_is_own, names)) if Path(folder) == self._real else set(),
            )  # fmt: skip
            os.replace(self.staged, old)  # under this name it is never taken for a run to resume
            try:
                exchange(old, self._real)
            except OSError:
                os.replace(old, self.staged)
                raise
        except OSError as error:  # shutil.Error is one
            raise StorageError(
                f"cannot put the new run in place of {self.output}: {getattr(error, 'strerror', None) or error}; it is "
                f"whole in {self.staged}"
            ) from error
        shutil.rmtree(old, ignore_errors=True)
        self.work = self.output

    def check_there(self) -> None:
        """Raise StorageError if somebody removed or renamed the folder while the run went on."""
        if not (self.work / RECIPE).exists():
            raise StorageError(
                f"{self.work} was removed or renamed during the run: the adapter is in {self.work / ADAPTER}, but the "
                "recipe and the log are not there"
            )

    def _check(self) -> None:
        for name in (*FILES, *FOLDERS):
            path = self.output / name
            if path.exists() and path.is_dir() != (name in FOLDERS):
                kind = ("file", "folder") if name in FOLDERS else ("folder", "file")
                raise StorageError(f"{path} is a {kind[0]}, but the run writes a {kind[1]} there; move it away")
        written = {os.path.realpath(self.output / name) for name in FILES}
        for key, file in input_files(self.recipe).items():
            if os.path.realpath(file) in written:
                raise StorageError(f"{key} is {file}, where the run writes a file of its own; name another folder")
        adapter = self.output / ADAPTER
        if adapter.is_dir() and any(adapter.iterdir()) and not (adapter / "adapter_config.json").is_file():
            raise StorageError(f"{adapter} is not an adapter, but the run writes one there; move it away")
        has_run = holds_run(self.output, self.recipe)
        if has_run and not (self._resume or self._overwrite):
            raise StorageError(
                f"{self.output} holds a run: {state_of(self.output)}; {_ways(self.output)}, or name another "
                "folder with --set output=..."
            )
        try:
            with tempfile.TemporaryFile(dir=self.output):
                pass
            if has_run:
                shutil.rmtree(self._real.with_name(f".{self._real.name}.replaced"), ignore_errors=True)
                self._check_replaceable()
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"cannot write {self.output}: {error.strerror or error}") from error

    def _check_replaceable(self) -> None:
        """Raise StorageError if the folder's name cannot be given to another one."""
        is_needed = self._overwrite or (self.output / METRICS).exists()
        if is_needed and (os.path.ismount(self._real) or not os.access(self._real.parent, os.W_OK)):
            raise StorageError(
                f"{self.output} cannot be replaced by another folder, since it is a mount point or the folder around "
                "it is read-only; train into a folder inside it with --set output=..."
            )

    def _stage(self, copied: bool, emptied: bool = True) -> None:
        """Work in the hidden folder from now on: as it is, emptied, or as a copy of the run."""
        if emptied:
            shutil.rmtree(self.staged, ignore_errors=True)
        self.staged.mkdir(exist_ok=True)
        shutil.copymode(self._real, self.staged)
        self._locks.enter_context(locked(self.staged))  # it keeps its lock when it gets the run's name
        if copied:
            for name in filter(_is_own, os.listdir(self._real)):
                source, target = self._real / name, self.staged / name
                # Links suffice: every file of a run is replaced, never written to.
                shutil.copytree(source, target, copy_function=_link) if source.is_dir() else _link(source, target)
        self.work = self.staged


def holds_run(folder: Path, recipe: Recipe) -> bool:
    """Return whether a folder holds something of a run that would be lost if this one wrote there."""
    there = {name for name in (*FILES, *FOLDERS) if (folder / name).exists()}
    if not has_steps(folder):
        there -= {CHAT} | ({LOG, RECIPE} if LOG in there else set())  # left by a run that took no step
    if CHECKPOINTS in there and not any((folder / CHECKPOINTS).iterdir()):
        there.remove(CHECKPOINTS)
    return bool(there) and not (there == {RECIPE} and _saved_recipe(folder) == recipe)


def state_of(folder: Path) -> str:
    """Return in words what run a folder holds."""
    title = None
    with contextlib.suppress(LorakitError):
        title = load_recipe(folder / RECIPE, check_files=False).title
    named = f" ('{title}')" if title else ""
    if (folder / METRICS).exists():
        return f"it is finished{named}"
    steps = _steps(folder)
    return f"it stopped after {steps} steps{named}" if steps else f"it has a part of one{named}"


def how_to_go_on(output: Path) -> str:
    """Return what to do after an interruption of `lorakit train`, in words."""
    new = output.with_name(f".{output.name}.new")
    folder = new if new.is_dir() else output
    if any((folder / CHECKPOINTS).glob("step-*")):
        return "go on from the last checkpoint with the same command and --resume"
    if (output / ADAPTER).is_dir() and folder is output and not (output / METRICS).exists():
        return f"the adapter is whole; evaluate it with: lorakit eval {output}"
    if has_steps(folder):
        again = "" if folder is new else " and --overwrite"
        return (
            "there is no checkpoint to go on from (train.checkpoint_every sets how often one is written); begin anew "
            f"with the same command{again}"
        )
    return "nothing was written"


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Return the settings that make two recipes different runs, as "train.lr: 0.001 in that run, 0.5 now"."""
    before, after = _settings(old), _settings(new)
    return [
        f"{key}: {before.get(key)} in that run, {after.get(key)} now"
        for key in dict.fromkeys((*before, *after))
        if before.get(key) != after.get(key)
    ]


def chat_of(record: Record) -> dict[str, Any]:
    """Return how chats with a run begin that was trained on such records, as JSON: "system" and "tools", or None."""
    first = record.messages[0]
    return {"system": first.content if first.role == "system" else None, "tools": record.tools}


def read_chat(folder: Path) -> dict[str, Any] | None:
    """Return how a run's chats begin, as `chat_of` has it; None for a run that does not keep it.

    Raises:
        CheckpointError: the file is broken.
    """
    return read_json_object(folder / CHAT) if (folder / CHAT).exists() else None


def _ways(folder: Path) -> str:
    is_open = not (folder / METRICS).exists() and has_steps(folder)
    return f"{'go on with it by --resume, ' if is_open else ''}replace it with --overwrite"


def _settings(recipe: Recipe) -> dict[str, Any]:
    without = {"title", "output", "eval", "probes", "train.progress", "train.eval_every", "train.checkpoint_every"}
    flat: dict[str, Any] = {}

    def add(values: dict[str, Any], prefix: str) -> None:
        for key, value in values.items():
            if f"{prefix}{key}" in without:
                continue
            if isinstance(value, dict):
                add(value, f"{prefix}{key}.")
            else:
                flat[f"{prefix}{key}"] = value

    add(recipe.model_dump(mode="json", exclude={"train": {"output", "seed", "max_length"}}), "")
    return flat


def _saved_recipe(folder: Path) -> Recipe | None:
    try:
        return load_recipe(folder / RECIPE, check_files=False)
    except LorakitError:
        return None


def _steps(folder: Path) -> int:
    return (folder / LOG).read_bytes().count(b"\n") if (folder / LOG).is_file() else 0


def _is_own(name: str) -> bool:
    is_leftover = name.startswith(".") and name.endswith(".part")  # of a killed write
    return name in FILES or name in FOLDERS or name.startswith(f"{LOG}.") or is_leftover


def _link(source: str | Path, target: str | Path) -> None:
    """Give a file a second name; copy it where the file system cannot."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(target)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
