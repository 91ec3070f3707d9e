"""One run, from recipe to report: load, attach, train, evaluate before and after, write the files.

A run's folder holds

    recipe.yaml          every setting, with defaults filled in
    chat.json            the system prompt of its chats
    adapter/             the adapter, in PEFT's format
    train.jsonl          one line a step
    probes.jsonl         with probes in the recipe: measurements inside the adapter, one line a step
    predictions.jsonl    each held-out record: prompt, reference, both answers, their scores
    metrics.json         before, after, verdict, counts, seconds, memory
    report.html, .md     the same for people
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..adapters import MatchReport, add_adapter, load_adapter, save_adapter
from ..data import Record, find_overlap, load_records, split_records
from ..errors import CheckpointError, ConfigError, first_few
from ..evaluation import EvalConfig
from ..files import finite, write_text
from ..inspection.probes import Probes
from ..locks import locked
from ..measure import peak_rss_mb
from ..models import Decoder, Tokenizer, load_model, load_tokenizer
from ..models.chat_template import today
from ..models.devices import check_device
from ..models.pretrained import KNOWN_MODELS
from ..training import TrainResult, train
from .evaluating import Measured, check_questions, measure, questions_of
from .recipe import Recipe, load_recipe
from .report import write_report
from .run_files import read_json_lines
from .run_folder import ADAPTER, METRICS, RECIPE, RunFolder, chat_of

Say = Callable[[str], None]


@dataclass
class RunRecords:
    """The training and held-out records of a run, and warnings about them."""

    train: list[Record]
    held_out: list[Record]
    notes: list[str] = field(default_factory=list)


def train_run(recipe: Recipe, say: Say = print, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Carry out a recipe; return the content of metrics.json (without `eval` in the recipe: only counts and times).

    Everything that training, evaluation and saving will need is checked before the first step.

    Args:
        say: receives one line a stage.
        resume: continue from the last checkpoint in the run's folder.
        overwrite: replace the run in the folder. It stays as it is until the new one is whole.

    Raises:
        LorakitError: something in the recipe, data or model is wrong, or the folder holds a run that is neither to be
            resumed nor overwritten; a failed run leaves no half-written file.
    """
    clock = _Clock()
    check_device(recipe.model.device, "model.device")
    place = RunFolder(recipe, say, resume, overwrite)
    with place.claimed():
        probes = [Probes(recipe.probes, say)] if recipe.probes else []
        records = read_records(recipe)
        say(f"data: {len(records.train)} to train on, {len(records.held_out)} held out")
        for note in records.notes:
            say(f"  {note}")
        questions = questions_of(recipe.eval, records.train, records.held_out) if recipe.eval else None
        model, tok = load_base(recipe)
        clock.lap("load")
        weights = recipe.model.quant_type or recipe.model.dtype
        say(f"model: {recipe.model.path}, {weights}, {clock.seconds['load']:.1f} s")
        if tok.is_dated:
            place.recipe = recipe = _dated(recipe, place.folders if resume else [])
            tok = tok.on(recipe.data.date or today())
            say(f"date in the conversations: {tok.date}")
        if questions:
            check_questions(questions, model, tok)
        torch.manual_seed(recipe.seed)
        attached = add_adapter(model, recipe.lora)
        say(str(attached))
        place.chat = chat_of(records.train[0])
        trained = train(
            model, tok, records.train, recipe.train, records.held_out, resume=resume, probes=probes, place=place
        )
        save_adapter(model, place.work / ADAPTER)
        place.check_there()
        clock.lap("train")
        facts = _facts(recipe, records, attached, trained)
        measured = measure(questions, model, tok, recipe.seed, clock.lap, say) if questions else None
        metrics = _write_results(place.work, recipe.output, facts, measured, clock)
        place.publish()
    return metrics


def evaluate_run(folder: Path, say: Say = print) -> dict[str, Any]:
    """Evaluate a finished run again, from its recipe and adapter; rewrite its metrics and report.

    Raises:
        CheckpointError: the folder holds no run.
        ConfigError: its recipe names no held-out records.
        DataError: its data are gone.
        StorageError: another process writes to the folder.
    """
    clock = _Clock()
    recipe = load_run_recipe(folder).model_copy(update={"output": folder})  # it may have been moved since
    with locked(folder):
        records = read_records(recipe)
        if not records.held_out:
            raise ConfigError(f"{folder / RECIPE}: no held-out records; set data.eval or data.eval_fraction and train")
        questions = questions_of(recipe.eval or EvalConfig(), records.train, records.held_out)
        model, tok = load_base(recipe)
        check_questions(questions, model, tok)
        attached = load_adapter(model, folder / ADAPTER)
        clock.lap("load")
        facts = _facts(recipe, records, attached, _earlier_training(folder))
        measured = measure(questions, model, tok, recipe.seed, clock.lap, say)
        return _write_results(folder, folder, facts, measured, clock)


def load_run(folder: Path, adapted: bool = True) -> tuple[Decoder, Tokenizer, Recipe]:
    """Load a run's base model, with its adapter unless `adapted` is False, its tokenizer and its recipe."""
    recipe = load_run_recipe(folder)
    model, tok = load_base(recipe)
    if adapted:
        load_adapter(model, folder / ADAPTER)
    return model, tok, recipe


def load_run_recipe(folder: Path) -> Recipe:
    """Read the recipe that a run saved.

    Raises:
        CheckpointError: the folder is not a run's, or its base is not here.
    """
    if not (folder / RECIPE).is_file():
        raise CheckpointError(f"{folder} is not the folder of a run: it has no {RECIPE}")
    recipe = load_recipe(folder / RECIPE, check_files=False)
    path = Path(recipe.model.path).expanduser()
    if recipe.model.path not in KNOWN_MODELS and not path.is_absolute() and not path.exists():
        raise CheckpointError(
            f"{folder / RECIPE}: model.path is '{recipe.model.path}', which is not here; it is relative to the folder "
            "where the run was trained: go there, or make the path absolute"
        )
    return recipe


def load_base(recipe: Recipe) -> tuple[Decoder, Tokenizer]:
    """Load the recipe's frozen base model and its tokenizer.

    Raises:
        ConfigError: the recipe's device is not on this machine.
    """
    section = recipe.model
    device, dtype = check_device(section.device, "model.device"), getattr(torch, section.dtype)
    model = load_model(section.path, section.quant_type, dtype, device, section.block_size, section.double_quant)
    assert model.folder is not None  # load_model sets it
    return model, load_tokenizer(model.folder, recipe.data.date)


def _dated(recipe: Recipe, resumed: Sequence[Path]) -> Recipe:
    """Return the recipe with a date for the chat template: its own, or that of the run that it resumes, or today's.

    Args:
        resumed: the folders that may hold that run, the likeliest first.
    """
    begun = [load_run_recipe(folder).data.date for folder in resumed if (folder / "recipe.yaml").is_file()]
    day = next((day for day in (recipe.data.date, *begun) if day is not None), today())
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"date": day})})


def read_records(recipe: Recipe) -> RunRecords:
    """Read the recipe's data, split it if the recipe says so, and look for questions on both sides."""
    train_records = load_records(recipe.data.train, recipe.data.format)
    if recipe.data.eval is not None:
        held_out = load_records(recipe.data.eval, recipe.data.format)
    elif recipe.data.eval_fraction is not None:
        train_records, held_out = split_records(train_records, recipe.data.eval_fraction, recipe.seed)
    else:
        return RunRecords(train_records, [])
    return RunRecords(train_records, held_out, _leaks(train_records, held_out))


def _leaks(train_records: Sequence[Record], held_out: Sequence[Record]) -> list[str]:
    """Return warnings about questions on both sides; one line if all held-out questions are trained on."""
    leaks = find_overlap(train_records, held_out)
    if sum(len(leak.eval_sources) for leak in leaks) == len(held_out):
        rows, others = (sorted(repr(record.messages) for record in side) for side in (train_records, held_out))
        return [
            "warning: "
            + (
                "the held-out records are the training records"
                if rows == others
                else "every held-out question is trained on"
            )
            + "; scores will show memory, not skill"
        ]
    return first_few(
        [
            f"warning: {', '.join(leak.eval_sources)} has the question of {leak.train_sources[0]}, which is "
            "trained on; scores will flatter"
            for leak in leaks
        ]
    )


def _write_results(
    folder: Path, shown: Path, facts: dict[str, Any], measured: Measured | None, clock: _Clock
) -> dict[str, Any]:
    """Write metrics and, after an evaluation, predictions and report; return the metrics.

    Args:
        folder: where to write.
        shown: the folder that the report names.
    """
    if measured is not None:
        facts |= measured.figures
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in measured.rows]
        write_text(folder / "predictions.jsonl", "".join(lines))
    metrics = _write_metrics(folder, facts | {"seconds": clock.total(), "peak_rss_mb": peak_rss_mb()})
    if measured is not None:
        write_report(folder, shown)
    return metrics


def _facts(recipe: Recipe, records: RunRecords, attached: MatchReport, trained: TrainResult) -> dict[str, Any]:
    return {
        "title": recipe.title,
        "model": {
            "path": recipe.model.path,
            "quant_type": recipe.model.quant_type,
            "parameters": attached.total - attached.trainable,
            "trainable_parameters": attached.trainable,
        },
        "counts": {
            "train": len(records.train),
            "eval": len(records.held_out),
            "steps": trained.steps,
            "tokens": trained.tokens,
            "trained_tokens": trained.trained_tokens,
        },
        "data": {"notes": records.notes},
        "versions": {"lorakit": version("lorakit"), "torch": torch.__version__, "python": platform.python_version()},
    }


def _earlier_training(folder: Path) -> TrainResult:
    """Return the result of a finished run as train.jsonl records it."""
    rows = read_json_lines(folder / "train.jsonl")
    totals = {key: sum(row.get(key, 0) for row in rows) for key in ("trained_tokens", "tokens")}
    return TrainResult(len(rows), rows, **totals)


def _write_metrics(folder: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    metrics = {key: finite(value) for key, value in metrics.items()}
    write_text(folder / METRICS, json.dumps(metrics, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return metrics


class _Clock:
    """Seconds per stage of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Book the time since the last lap on `stage`."""
        now = time.perf_counter()
        self.seconds[stage], self._last = now - self._last, now

    def total(self) -> dict[str, float]:
        """Return the seconds per stage, and their total."""
        return {key: round(value, 2) for key, value in self.seconds.items()} | {
            "total": round(time.perf_counter() - self._start, 2)
        }
