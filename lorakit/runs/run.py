"""One run, from recipe to report: load, attach, train, evaluate before and after, write the files.

A run's folder holds

    recipe.yaml          every setting, with defaults filled in
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
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..adapters import MatchReport, add_adapter, disable_adapters, load_adapter, save_adapter
from ..data import Record, find_overlap, load_records, split_records
from ..errors import CheckpointError, ConfigError
from ..evaluation import (
    EvalConfig,
    Score,
    check_references,
    choose_examples,
    evaluate_outputs,
    general_text,
    key_for_metrics,
    prompted_messages,
    row_scores,
    scores_as_json,
    split_record,
    verdict,
)
from ..evaluation.perplexity import perplexity
from ..files import write_text
from ..inspection.probes import Probes
from ..measure import peak_rss_mb
from ..models import Decoder, Tokenizer, generate, load_model, load_tokenizer
from ..models.chat_template import today
from ..training import TrainResult, train
from .recipe import Recipe, load_recipe, save_recipe
from .report import write_report
from .run_files import read_json_lines

Say = Callable[[str], None]


@dataclass
class RunRecords:
    """The training and held-out records of a run, and warnings about them."""

    train: list[Record]
    held_out: list[Record]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LoadedRun:
    """A recipe with its records and model in memory.

    Attributes:
        recipe: the settings.
        records: the training and held-out records.
        model: the base model with the run's adapter attached.
        tok: the model's tokenizer.
    """

    recipe: Recipe
    records: RunRecords
    model: Decoder
    tok: Tokenizer


def train_run(recipe: Recipe, say: Say = print, resume: bool = False) -> dict[str, Any]:
    """Carry out a recipe; return the content of metrics.json (without `eval` in the recipe: only counts and times).

    Args:
        say: receives one line a stage.
        resume: whether to continue from the last checkpoint in the run's folder.

    Raises:
        LorakitError: something in the recipe, data or model is wrong; a failed run leaves no half-written file.
    """
    clock = _Clock()
    records = read_records(recipe)
    say(f"data: {len(records.train)} to train on, {len(records.held_out)} held out")
    for note in records.notes:
        say(f"  {note}")
    if recipe.eval and records.held_out:
        check_references([split_record(r)[1] for r in records.held_out], recipe.eval.metrics)
    model, tok = load_base(recipe)
    clock.lap("load")
    say(f"model: {recipe.model.path}, {recipe.model.quant_type or recipe.model.dtype}, {clock.seconds['load']:.1f} s")
    if tok.is_dated:
        recipe = _dated(recipe, [recipe.output] if resume else [])
        tok = tok.on(recipe.data.date or today())
        say(f"date in the conversations: {tok.date}")
    torch.manual_seed(recipe.seed)
    attached = add_adapter(model, recipe.lora)
    say(str(attached))
    recipe.output.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, recipe.output / "recipe.yaml")
    probes = [Probes(recipe.probes, say)] if recipe.probes else []
    trained = train(model, tok, records.train, recipe.train, records.held_out, resume=resume, probes=probes)
    save_adapter(model, recipe.output / "adapter")
    clock.lap("train")
    facts = _facts(recipe, records, attached, trained)
    if recipe.eval and records.held_out:
        return evaluate(LoadedRun(recipe, records, model, tok), recipe.eval, facts, clock, say)
    return _write_metrics(recipe.output, facts | {"seconds": clock.total(), "peak_rss_mb": peak_rss_mb()})


def evaluate_run(folder: Path, say: Say = print) -> dict[str, Any]:
    """Evaluate a finished run again, from its recipe and adapter; rewrite its metrics and report.

    Raises:
        CheckpointError: the folder holds no run.
        ConfigError: its recipe names no held-out records.
        DataError: its data are gone.
    """
    clock = _Clock()
    recipe = load_run_recipe(folder).model_copy(update={"output": folder})  # it may have been moved since
    records = read_records(recipe)
    if not records.held_out:
        raise ConfigError(
            f"{folder / 'recipe.yaml'}: no held-out records; set data.eval or data.eval_fraction and train"
        )
    config = recipe.eval or EvalConfig()
    check_references([split_record(r)[1] for r in records.held_out], config.metrics)
    model, tok = load_base(recipe)
    attached = load_adapter(model, folder / "adapter")
    clock.lap("load")
    facts = _facts(recipe, records, attached, _earlier_training(folder))
    return evaluate(LoadedRun(recipe, records, model, tok), config, facts, clock, say)


def load_run(folder: Path, adapted: bool = True) -> tuple[Decoder, Tokenizer, Recipe]:
    """Load a run's base model, with its adapter unless `adapted` is False, its tokenizer and its recipe."""
    recipe = load_run_recipe(folder)
    model, tok = load_base(recipe)
    if adapted:
        load_adapter(model, folder / "adapter")
    return model, tok, recipe


def load_run_recipe(folder: Path) -> Recipe:
    """Read the recipe that a run saved.

    Raises:
        CheckpointError: the folder is not a run's.
    """
    if not (folder / "recipe.yaml").is_file():
        raise CheckpointError(f"{folder} is not the folder of a run: it has no recipe.yaml")
    return load_recipe(folder / "recipe.yaml", check_files=False)


def load_base(recipe: Recipe) -> tuple[Decoder, Tokenizer]:
    """Load the recipe's frozen base model and its tokenizer."""
    section = recipe.model
    dtype = getattr(torch, section.dtype)
    model = load_model(
        section.path, section.quant_type, dtype, section.device, section.block_size, section.double_quant
    )
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
    notes = [
        f"warning: {leak} - the same question is trained on and held out; scores will flatter"
        for leak in find_overlap(train_records, held_out)
    ]
    return RunRecords(train_records, held_out, notes)


def evaluate(run: LoadedRun, config: EvalConfig, facts: dict[str, Any], clock: _Clock, say: Say) -> dict[str, Any]:
    """Measure base (strong prompt) and tuned model (short prompt); write predictions, metrics and report.

    Args:
        facts: the content of metrics.json besides the scores.
        clock: books the time of each side.
        say: receives one line a side.

    Returns:
        The content of metrics.json.
    """
    recipe, records, model, tok = run.recipe, run.records, run.model, run.tok
    held_out = records.held_out[: config.limit]
    short, references = map(list, zip(*(split_record(record) for record in held_out), strict=True))
    examples = choose_examples(records.train, config.base_prompt.examples, key_for_metrics(config.metrics))
    strong = [prompted_messages(record, config.base_prompt.text(), examples) for record in held_out]
    sources = [record.source for record in held_out]
    text = general_text(config.general_text)
    answers: dict[str, list[str]] = {}
    scores: dict[str, Mapping[str, Score]] = {}
    general: dict[str, float] = {}
    for side, prompts in (("base", strong), ("tuned", short)):
        say(f"evaluate {side}: {len(prompts)} held-out records")
        with disable_adapters(model) if side == "base" else nullcontext():
            answers[side] = list(generate(model, tok, prompts, config.max_new_tokens, batch_size=config.batch_size))
            general[side] = perplexity(model, tok, text)
        scores[side] = evaluate_outputs(
            answers[side], references, config.metrics, sources, config.bootstrap_samples, recipe.seed
        )
        clock.lap(f"evaluate_{side}")
    judged = verdict(
        scores["base"], scores["tuned"], general["base"], general["tuned"], config.bootstrap_samples, recipe.seed
    )
    rows = [
        {
            "source": source, "messages": prompt, "reference": reference,
            "base": answers["base"][i], "tuned": answers["tuned"][i],
            "scores": {side: row_scores(scores[side], i) for side in scores},
        }
        for i, (source, prompt, reference) in enumerate(zip(sources, short, references, strict=True))
    ]  # fmt: skip
    write_text(recipe.output / "predictions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    metrics = facts | {
        "base_prompted": scores_as_json(scores["base"], general["base"]),
        "tuned": scores_as_json(scores["tuned"], general["tuned"]),
        "best": {name: score.best for name, score in scores["tuned"].items()},
        "verdict": asdict(judged),
        "seconds": clock.total(),
        "peak_rss_mb": peak_rss_mb(),
    }
    _write_metrics(recipe.output, metrics)
    write_report(recipe.output)
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
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
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
