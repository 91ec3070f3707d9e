"""The evaluation of a run: the questions to both models, checked before training, and the answers' scores after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from ..adapters import disable_adapters
from ..data import Record
from ..errors import DataError
from ..evaluation import (
    EvalConfig,
    Score,
    check_prompts,
    check_references,
    choose_examples,
    evaluate_outputs,
    general_text,
    key_for_metrics,
    prompted_messages,
    row_scores,
    scores_as_json,
    split_all,
    verdict,
)
from ..evaluation.perplexity import perplexity
from ..evaluation.prompting import Chat
from ..models import Decoder, Tokenizer, generate


@dataclass(frozen=True)
class Questions:
    """What both models are asked, and what counts as right.

    Attributes:
        config: the settings of the evaluation.
        short: the tuned model's prompts.
        strong: the base model's, for the same records.
        references: the right answers.
        sources: the source of each record.
        text: for the general perplexity.
        base_prompt: what the base model is given besides the record's own prompt: "instructions", whether it has them,
            and "examples", how many.
    """

    config: EvalConfig
    short: list[Chat]
    strong: list[Chat]
    references: list[str]
    sources: list[str]
    text: str
    base_prompt: dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """The evaluation's part of metrics.json, and the rows of predictions.jsonl."""

    figures: dict[str, Any]
    rows: list[dict[str, Any]]


def questions_of(config: EvalConfig, train_records: Sequence[Record], held_out: Sequence[Record]) -> Questions:
    """Prepare the evaluation, as far as it needs no model.

    Raises:
        DataError: a held-out record, or one that may serve as an example, does not end with an answer; a reference does
            not fit a metric; the general text is empty.
        ConfigError: a schema or the instructions cannot be read, or a metric's package is not installed.
    """
    held_out = held_out[: config.limit]
    sources = [record.source for record in held_out]
    short, references = split_all(held_out)
    check_references(references, config.metrics, sources)
    instructions = config.base_prompt.text()
    examples = choose_examples(train_records, config.base_prompt.examples, key_for_metrics(config.metrics))
    strong = [prompted_messages(record, instructions, examples) for record in held_out]
    base_prompt = {"instructions": instructions is not None, "examples": len(examples)}
    return Questions(config, short, strong, references, sources, general_text(config.general_text), base_prompt)


def check_questions(questions: Questions, model: Decoder, tok: Tokenizer) -> None:
    """Make sure that the model can answer the questions.

    Raises:
        DataError: as `check_prompts`; or the general text has a token that the model has no row for, or too few tokens.
    """
    config, rows = questions.config, model.config.vocab_size
    check_prompts(model, tok, questions.short, questions.sources, config.max_new_tokens, "tuned model")
    check_prompts(model, tok, questions.strong, questions.sources, config.max_new_tokens, "base model")
    ids = tok.encode(questions.text)
    where = f"general_text {config.general_text}" if config.general_text else "lorakit's general_text"
    if len(ids) < 2:
        raise DataError(f"{where} has {len(ids)} tokens; perplexity needs a few hundred words or more")
    if max(ids) >= rows:
        raise DataError(f"{where} has the token {max(ids)}; the model's embedding has {rows} rows")


def measure(
    questions: Questions,
    model: Decoder,
    tok: Tokenizer,
    seed: int,
    lap: Callable[[str], None],
    say: Callable[[str], None],
) -> Measured:
    """Measure the base model (strong prompt) and the tuned one (short prompt).

    Args:
        seed: of the bootstrap.
        lap: called with the name of each stage when it is over.
        say: receives one line a side.
    """
    config = questions.config
    answers: dict[str, list[str]] = {}
    scores: dict[str, Mapping[str, Score]] = {}
    general: dict[str, float] = {}
    for side, prompts in (("base", questions.strong), ("tuned", questions.short)):
        say(f"evaluate {side}: {len(prompts)} held-out records")
        with disable_adapters(model) if side == "base" else nullcontext():
            answers[side] = list(generate(model, tok, prompts, config.max_new_tokens, batch_size=config.batch_size))
            general[side] = perplexity(model, tok, questions.text)
        scores[side] = evaluate_outputs(
            answers[side], questions.references, config.metrics, questions.sources, config.bootstrap_samples, seed
        )
        lap(f"evaluate_{side}")
    judged = verdict(scores["base"], scores["tuned"], general["base"], general["tuned"], config.bootstrap_samples, seed)
    rows = [
        {
            "source": source, "messages": prompt, "reference": reference,
            "base": answers["base"][i], "tuned": answers["tuned"][i],
            "scores": {side: row_scores(scores[side], i) for side in scores},
        }
        for i, (source, prompt, reference) in enumerate(
            zip(questions.sources, questions.short, questions.references, strict=True)
        )
    ]  # fmt: skip
    figures = {
        "base_prompt": questions.base_prompt,
        "base_prompted": scores_as_json(scores["base"], general["base"]),
        "tuned": scores_as_json(scores["tuned"], general["tuned"]),
        "best": {name: score.best for name, score in scores["tuned"].items()},
        "verdict": asdict(judged),
    }
    return Measured(figures, rows)
