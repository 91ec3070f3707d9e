"""Evaluation of a run: task metrics with intervals, the before/after verdict, perplexity on general text."""

from .bootstrap import Difference, bootstrap_interval, paired_difference
from .config import BasePrompt, EvalConfig, general_text
from .gate import Verdict, verdict
from .metrics import (
    FieldMetric,
    MetricConfig,
    SchemaMetric,
    Score,
    check_references,
    evaluate_outputs,
    metric_config,
    row_scores,
    scores_as_json,
)
from .prompting import check_prompts, choose_examples, key_for_metrics, prompted_messages, split_all, split_record

__all__ = [
    "BasePrompt",
    "Difference",
    "EvalConfig",
    "FieldMetric",
    "MetricConfig",
    "SchemaMetric",
    "Score",
    "Verdict",
    "bootstrap_interval",
    "check_prompts",
    "check_references",
    "choose_examples",
    "evaluate_outputs",
    "general_text",
    "key_for_metrics",
    "metric_config",
    "paired_difference",
    "prompted_messages",
    "row_scores",
    "scores_as_json",
    "split_all",
    "split_record",
    "verdict",
]
