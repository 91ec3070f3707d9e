"""The report of a run: whether it helped, what it broke, how to go on and how to go back.

`write_report` reads the run's files, computes everything that the report shows, and passes it to two templates:
report.html.jinja (one file, readable offline) and report.md.jinja. Text from a model is never markup: the HTML template
escapes it, the Markdown template fences it.
"""

from __future__ import annotations

import os
import random
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..evaluation.bootstrap import Difference, paired_difference
from ..evaluation.gate import format_perplexity, format_score
from ..evaluation.metrics import RESERVED_NAMES
from ..files import write_text
from .charts import Dot, interval_plot, loss_curve, loss_summary, nice_ticks
from .run_files import Run, read_run
from .wording import base_heading, base_sentence, duration, fenced, inline, number, shorten, signed, words

EXAMPLES = 10  # rows shown side by side
EXAMPLES_SEED = 0


@dataclass(frozen=True)
class Side:
    """One model's value of one metric, as shown: "0.80" and "0.72 to 0.87"."""

    value: float
    text: str
    interval: tuple[float, float] | None
    interval_text: str


@dataclass(frozen=True)
class MetricRow:
    """One line of the table; `change` and `change_interval` are empty if the base was not evaluated."""

    name: str
    base: Side | None
    tuned: Side | None
    change: str
    change_interval: str
    beyond_noise: bool | None
    plot: Markup


def write_report(run_folder: str | os.PathLike[str], shown: str | os.PathLike[str] | None = None) -> tuple[Path, Path]:
    """Write report.html and report.md into a run folder and return their paths.

    The folder needs metrics.json. Without train.jsonl or predictions.jsonl the report says that they are missing;
    without recipe.yaml it leaves the recipe out.

    Args:
        shown: the folder that the report's commands name, if the run's files are to be moved there.

    Raises:
        DataError: metrics.json is missing, or a file is malformed; the message names file and line.
        StorageError: a report cannot be written; an older one is left as it was.
    """
    run = read_run(Path(run_folder))
    context = report_context(run) | {"next_steps": _next_steps(Path(shown or run.folder))}
    html, markdown = run.folder / "report.html", run.folder / "report.md"
    write_text(html, _environment(autoescape=True).get_template("report.html.jinja").render(context))
    write_text(markdown, _environment(autoescape=False).get_template("report.md.jinja").render(context))
    return html, markdown


def report_context(run: Run) -> dict[str, Any]:
    """Compute everything that the templates show; they format nothing themselves."""
    metrics = run.metrics
    base, tuned = metrics.get("base_prompted") or {}, metrics.get("tuned") or {}
    verdict, notes = metrics.get("verdict") or {}, (metrics.get("data") or {}).get("notes") or []
    best = {name: _best(name, metrics.get("best") or {}, base, tuned) for name in _metric_names(base, tuned)}
    examples = _examples(run.predictions, best, base_heading(metrics))
    return {
        "title": metrics.get("title") or run.folder.name,
        "summary": _summary(metrics),
        "verdict": _verdict(verdict),
        "has_base": bool(base),
        "base_prompt": base_sentence(metrics),
        "base_heading": base_heading(metrics),
        "rows": [metric_row(name, best[name], base, tuned, verdict, run.predictions) for name in best],
        "held_out": len(run.predictions) or (metrics.get("counts") or {}).get("eval"),
        "perplexity": _perplexity(base, tuned),
        "loss_curve": loss_curve(run.steps),
        "loss_summary": loss_summary(run.steps),
        "loss_note": _loss_note(run.steps),
        "has_held_out_loss": any(isinstance(step.get("eval_loss"), int | float) for step in run.steps),
        "shared_system": _lift_shared_system(examples),
        "examples": examples,
        "facts": _facts(metrics),
        "versions": metrics.get("versions") or {},
        "notes": notes,
        "unseen": "" if notes else ", which training never saw",
        "recipe": run.recipe,
    }


def metric_row(
    name: str,
    best: float,
    base: Mapping[str, Any],
    tuned: Mapping[str, Any],
    verdict: Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
) -> MetricRow:
    """Lay out one metric: both values, their difference with its interval if known, and the plot."""
    sides = {"base": _side(name, base, best), "tuned": _side(name, tuned, best)}
    dots = [Dot(kind, kind, side.value, side.interval, side.text) for kind, side in sides.items() if side is not None]
    plot = interval_plot(name, dots, best)
    before, after = sides["base"], sides["tuned"]
    if before is None or after is None:
        return MetricRow(name, before, after, "", "", None, plot)
    change = signed(after.value - before.value, best)
    difference = _difference(name, before, after, verdict, predictions)
    if difference is None:
        return MetricRow(name, before, after, change, "", None, plot)
    interval = f"{signed(difference.low, best)} to {signed(difference.high, best)}"
    return MetricRow(name, before, after, change, interval, difference.beyond_noise, plot)


# Reading --------------------------------------------------------------------------------------------------------------


def _metric_names(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> list[str]:
    names = dict.fromkeys([*tuned, *base])  # an ordered set
    values = {name: tuned.get(name, base.get(name)) for name in names if name not in RESERVED_NAMES}
    return [name for name, value in values.items() if isinstance(value, int | float)]


def _side(name: str, scores: Mapping[str, Any], best: float) -> Side | None:
    if scores.get(name) is None:
        return None
    interval = (scores.get("intervals") or {}).get(name)
    text = format_score(scores[name], best)
    if interval is None:
        return Side(scores[name], text, None, "")
    low, high = interval
    return Side(scores[name], text, (low, high), f"{format_score(low, best)} to {format_score(high, best)}")


def _best(name: str, recorded: Mapping[str, float], *sides: Mapping[str, Any]) -> float:
    """Return the end of a metric's scale; if the run did not record it, 1, 100 or the tick above the values."""
    if name in recorded:
        return recorded[name]
    top = max(side[name] for side in sides if side.get(name) is not None)
    if top > 100.0:
        return nice_ticks(0.0, top, 4, outer=True)[-1]
    return 100.0 if top > 1.0 else 1.0


def _difference(
    name: str, before: Side, after: Side, verdict: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]]
) -> Difference | None:
    """Return the verdict's difference, or else compute it, if the predictions are all rows behind the two values."""
    if recorded := (verdict.get("differences") or {}).get(name):
        return Difference(recorded["value"], recorded["low"], recorded["high"], recorded["count"])
    try:
        rows = [(float(row["scores"]["base"][name]), float(row["scores"]["tuned"][name])) for row in predictions]
    except (KeyError, TypeError):  # some row was not scored on both sides
        return None
    if not rows:
        return None
    difference = paired_difference([base for base, _ in rows], [tuned for _, tuned in rows])
    return difference if abs(difference.value - (after.value - before.value)) < 1e-6 else None


# Laying out -----------------------------------------------------------------------------------------------------------


def _summary(metrics: Mapping[str, Any]) -> str:
    model, counts = metrics.get("model") or {}, metrics.get("counts") or {}
    parts = []
    if model.get("path"):
        parts.append(
            Path(model["path"]).name + (f" in {model['quant_type'].upper()}" if model.get("quant_type") else "")
        )
    if model.get("parameters") and model.get("trainable_parameters"):
        share = model["trainable_parameters"] / model["parameters"]
        parts.append(f"{model['trainable_parameters']:,} trained parameters ({share:.1%})")
    if "train" in counts:
        parts.append(f"{counts['train']:,} training records")
    if "eval" in counts:
        parts.append(f"{counts['eval']:,} held out")
    return ", ".join(parts)


def _verdict(verdict: Mapping[str, Any]) -> dict[str, Any]:
    kind = {True: "helped", False: "harmed", None: "undecided"}[verdict.get("helped")]
    label = {"helped": "Helped", "harmed": "Made it worse", "undecided": "Undecided"}[kind]
    if verdict.get("helped") and verdict.get("forgot"):
        kind, label = "harmed", "Helped, but forgot"
    return {
        "kind": kind,
        "label": label,
        "sentence": verdict.get("sentence") or "This run was not judged.",
        "findings": verdict.get("findings") or [],
    }


def _perplexity(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict[str, str] | None:
    """Lay out the general perplexity of both sides; None if neither was measured."""
    key = "perplexity_general"
    if key not in base and key not in tuned:
        return None
    before, after = base.get(key), tuned.get(key)
    change = f"{after / before - 1.0:+.1%}" if before and after is not None else ""
    texts = {
        name: "not finite" if side[key] is None else format_perplexity(side[key])
        for name, side in (("base", base), ("tuned", tuned))
        if key in side
    }
    return {"base": "", "tuned": ""} | texts | {"change": change.replace("-", "\u2212")}


def _loss_note(steps: Sequence[Mapping[str, Any]]) -> str:
    evaluated = [(step["eval_loss"], step["step"]) for step in steps if isinstance(step.get("eval_loss"), int | float)]
    losses = [step.get("loss") for step in steps]
    broken = sum(1 for loss in losses if not isinstance(loss, int | float) or loss != loss or abs(loss) == float("inf"))
    note = ""
    if evaluated:
        loss, step = min(evaluated)
        note += f" The held-out loss was lowest, {loss:.3f}, at step {step:,} of {steps[-1]['step']:,}."
    if broken:
        note += f" Left out: {broken:,} without a finite loss."
    return note


def _examples(
    predictions: Sequence[Mapping[str, Any]], best: Mapping[str, float], heading: str
) -> list[dict[str, Any]]:
    """Choose the first rows of a seeded shuffle, so that none is picked by hand, and cut long texts."""
    order = list(range(len(predictions)))
    random.Random(EXAMPLES_SEED).shuffle(order)
    examples = []
    for index in order[:EXAMPLES]:
        row = predictions[index]
        reference = row.get("reference") or ""
        scores = row.get("scores") or {}
        answers = [
            {
                "kind": kind,
                "label": label,
                "text": shorten(row[kind]),
                "scores": ", ".join(
                    f"{name} {_row_score(value, best.get(name, 1.0))}"
                    for name, value in (scores.get(kind) or {}).items()
                ),
                "identical": row[kind].strip() == reference.strip(),
            }
            for kind, label in (("base", heading), ("tuned", "Tuned, short prompt"))
            if isinstance(row.get(kind), str)
        ]
        prompt = [{"role": turn["role"], "text": shorten(turn["content"])} for turn in row.get("messages") or []]
        examples.append(
            {"source": row.get("source") or "", "prompt": prompt, "answers": answers, "reference": shorten(reference)}
        )
    return examples


def _lift_shared_system(examples: Sequence[dict[str, Any]]) -> str:
    """If all examples have the same system message, remove it from each and return it; else return ""."""
    firsts = [example["prompt"][0] if example["prompt"] else {"role": ""} for example in examples]
    if len(examples) < 2 or firsts[0]["role"] != "system" or any(first != firsts[0] for first in firsts):
        return ""
    for example in examples:
        del example["prompt"][0]
    return str(firsts[0]["text"])


def _next_steps(folder: Path) -> list[dict[str, str]]:
    run, adapter = (shlex.quote(str(path)) for path in (folder, folder / "adapter"))
    return [
        {
            "title": "Talk to it",
            "text": "The metrics above measure the task, not the model's behavior outside it. Ask it something else.",
            "command": f"lorakit chat {run}",
        },
        {
            "title": "Train on your own data",
            "text": "Put conversations in a JSONL file, one per line, name it in a copy of the recipe, and train that.",
            "command": "lorakit train my-recipe.yaml",
        },
        {
            "title": "Roll back",
            "text": "The run never changed the base model. Talk to it without the adapter to compare. To roll back, "
            "delete the adapter.",
            "command": f"lorakit chat {run} --base\nrm -r {adapter}",
        },
    ]


def _facts(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    model, counts, seconds = (metrics.get(key) or {} for key in ("model", "counts", "seconds"))
    facts = [("Model", model.get("path") or ""), ("Base weights", (model.get("quant_type") or "not quantized"))]
    if model.get("parameters"):
        facts.append(("Parameters", f"{model['parameters']:,}"))
    if model.get("trainable_parameters"):
        facts.append(("Trained parameters", f"{model['trainable_parameters']:,}"))
    names = {
        "train": "Training records",
        "eval": "Held-out records",
        "steps": "Steps",
        "trained_tokens": "Trained tokens",
    }
    facts += [(names.get(key, words(key)), number(value)) for key, value in counts.items()]
    if counts.get("trained_tokens") and seconds.get("train"):
        facts.append(("Trained tokens per second", f"{counts['trained_tokens'] / seconds['train']:,.0f}"))
    facts += [(f"Time, {words(key).lower()}", duration(value)) for key, value in seconds.items() if value is not None]
    if metrics.get("peak_rss_mb"):
        facts.append(("Peak memory of the process", f"{metrics['peak_rss_mb']:,.0f} MB"))
    return [(name, text) for name, text in facts if text]


def table_cell(side: Side | None) -> str:
    """Return a value and its interval as one cell of a Markdown table."""
    if side is None:
        return "not measured"
    return f"{side.text} ({side.interval_text})" if side.interval_text else side.text


def _row_score(value: float, best: float) -> str:
    return f"{value:g}" if best <= 1.0 else f"{value:.1f}"


def _environment(autoescape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lorakit.runs", ""),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["cell"] = table_cell
    environment.filters.update(fenced=fenced, inline=inline, arrows=lambda text: text.replace(" -> ", " → "))
    return environment
