"""The verdict: one sentence that says whether a run helped, and the findings behind it.

A metric "rose" or "fell" only if the paired bootstrap interval of its change excludes zero. Perplexity on general text
is judged apart. It says nothing about the task, but shows what the adapter did to everything else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..printed import Printed
from .bootstrap import Difference, paired_difference
from .metrics import Score

# With fewer rows percentile intervals are too narrow (see bootstrap.py), so nothing is called a change.
FEWEST_ROWS = 20

# Relative changes of the perplexity on general text. Both limits are conventions, not results: up to 1% counts as
# unchanged, and a rise of more than a tenth as forgetting.
UNCHANGED = 0.01
FORGETTING = 0.10


@dataclass(frozen=True, repr=False)
class Verdict(Printed):
    """Whether a run helped.

    Attributes:
        helped: True: at least one metric rose and none fell. False: at least one fell and none rose, or the perplexity
            is no longer finite. None: mixed, no difference beyond noise, too few rows, or nothing to compare with.
        sentence: one sentence in words and figures.
        findings: one sentence per metric, then one on general perplexity.
        differences: tuned minus base of each metric, over the same rows.
        forgot: whether the perplexity on general text rose by more than `FORGETTING`; None if it was not measured.
    """

    helped: bool | None
    sentence: str
    findings: list[str]
    differences: dict[str, Difference] = field(default_factory=dict)
    forgot: bool | None = None

    def __str__(self) -> str:
        return "\n".join([self.sentence, *(f"- {finding}" for finding in self.findings)])


def verdict(
    before: Mapping[str, Score] | None,
    after: Mapping[str, Score],
    perplexity_before: float | None = None,
    perplexity_after: float | None = None,
    samples: int = 2000,
    seed: int = 0,
) -> Verdict:
    """Compare the base model (strong prompt) with the tuned one (short prompt) on the same held-out rows.

    Args:
        before: the base model's scores from `evaluate_outputs`, or None if it was not evaluated.
        after: the tuned model's scores, on the same rows.
        perplexity_before, perplexity_after: on the same general text; None if not measured.
        samples, seed: settings of the paired bootstrap.

    Raises:
        DataError: `before` and `after` do not score the same rows.
    """
    perplexity = perplexity_finding(perplexity_before, perplexity_after)
    forgot = forgets(perplexity_before, perplexity_after)
    if before is None:
        sentence = "Not compared: the base model was not evaluated"
        findings = [f"{name}: {format_score(score.value, score.best)}" for name, score in after.items()]
        return Verdict(None, _join(sentence, perplexity), findings + _listed(perplexity), {}, forgot)

    shared = [name for name in after if name in before]
    differences = {
        name: paired_difference(before[name].rows, after[name].rows, samples=samples, seed=seed) for name in shared
    }
    findings = [_finding(name, before[name], after[name], differences[name]) for name in shared]
    if perplexity_after is not None and not math.isfinite(perplexity_after):
        sentence = "It broke the model: the perplexity on general text is no longer a finite number."
        return Verdict(False, sentence, findings + _listed(perplexity), differences, forgot)
    helped, sentence = _judge(before, after, differences)
    return Verdict(helped, _join(sentence, perplexity), findings + _listed(perplexity), differences, forgot)


def forgets(before: float | None, after: float | None) -> bool | None:
    """Return whether perplexity on general text rose by more than `FORGETTING`; None if either was not measured."""
    if before is None or after is None:
        return None
    return not after <= before * (1.0 + FORGETTING)  # this form counts NaN as forgetting


def perplexity_finding(before: float | None, after: float | None) -> str | None:
    """Return the change of the perplexity on general text in words; None if the tuned model's is not known."""
    if after is None:
        return None
    if before is None:
        return f"general perplexity {format_perplexity(after)}"
    figures = f"{format_perplexity(before)} -> {format_perplexity(after)}"
    change = after / before - 1.0
    if not math.isfinite(change):
        return f"general perplexity is no longer a finite number ({figures})"
    if abs(change) <= UNCHANGED:
        return f"general perplexity unchanged within {UNCHANGED:.0%} ({figures})"
    if change <= FORGETTING:
        return f"general perplexity {'rose' if change > 0 else 'fell'} {abs(change):.0%} ({figures})"
    return f"forgetting: general perplexity rose {change:.0%} ({figures})"


def format_score(value: float, best: float = 1.0) -> str:
    """Format a score: two decimals for shares, one for chrF, more if rounding would make it perfect or zero."""
    decimals = 2 if best <= 1.0 else 1
    while decimals < 4 and value not in (0.0, best) and round(value, decimals) in (0.0, best):
        decimals += 1
    return f"{value:.{decimals}f}"


def format_perplexity(value: float) -> str:
    """Format a perplexity: one decimal below a thousand, none above."""
    return f"{value:.1f}" if value < 1000 or not math.isfinite(value) else f"{value:,.0f}"


def _judge(
    before: Mapping[str, Score], after: Mapping[str, Score], differences: Mapping[str, Difference]
) -> tuple[bool | None, str]:
    def figures(names: list[str]) -> str:
        return ", ".join(f"{name} {_from_to(before[name], after[name])}" for name in names)

    if not differences:
        return None, "Not compared: the two evaluations have no metric in common"
    rows = min(difference.count for difference in differences.values())
    rose = [name for name, difference in differences.items() if difference.low > 0.0]
    fell = [name for name, difference in differences.items() if difference.high < 0.0]
    if rows < FEWEST_ROWS:
        reason = f"Cannot tell from {rows} held-out row{'' if rows == 1 else 's'}, at least {FEWEST_ROWS} are needed"
        return None, f"{reason}: {figures(list(differences))}"
    if rose and fell:
        return None, f"Mixed: {figures(rose)} rose, but {figures(fell)} fell"
    if rose:
        return True, f"It helped: {figures(rose)}"
    if fell:
        return False, f"It made things worse: {figures(fell)}"
    return None, f"No difference beyond noise on {rows} held-out rows: {figures(list(differences))}"


def _finding(name: str, before: Score, after: Score, difference: Difference) -> str:
    figures = f"{_from_to(before, after)} on {difference.count} rows"
    change = format_score(abs(difference.value), after.best)
    interval = f"95% interval {_signed(difference.low, after.best)} to {_signed(difference.high, after.best)}"
    if difference.count < FEWEST_ROWS:
        return f"{name}: {figures}, too few to tell a change from noise."
    if not difference.beyond_noise:
        return f"{name}: no difference beyond noise, {figures} ({interval})."
    return f"{name} {'rose' if difference.value > 0 else 'fell'} by {change}, {figures} ({interval})."


def _from_to(before: Score, after: Score) -> str:
    return f"{format_score(before.value, before.best)} -> {format_score(after.value, after.best)}"


def _signed(value: float, best: float) -> str:
    return ("+" if value > 0 else "-" if value < 0 else "") + format_score(abs(value), best)


def _join(sentence: str, perplexity: str | None) -> str:
    return f"{sentence}; {perplexity}." if perplexity else f"{sentence}."


def _listed(perplexity: str | None) -> list[str]:
    return [f"{perplexity[0].upper()}{perplexity[1:]}."] if perplexity else []
