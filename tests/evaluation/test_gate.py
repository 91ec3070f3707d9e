"""The verdict's words for every outcome, on scores computed from real rows."""

import numpy as np
import pytest

from lorakit.errors import DataError
from lorakit.evaluation.bootstrap import bootstrap_interval
from lorakit.evaluation.gate import format_perplexity, format_score, perplexity_finding, verdict
from lorakit.evaluation.metrics import Score


def score(rows, best=1.0):
    rows = np.asarray(rows, dtype=np.float64)
    return Score(float(rows.mean()), *bootstrap_interval(rows), len(rows), best, rows)


def share(right, count=100):
    return score([1.0] * right + [0.0] * (count - right))


def test_helped():
    found = verdict(
        {"schema_valid": share(21), "topic_accuracy": share(35)},
        {"schema_valid": share(99), "topic_accuracy": share(80)},
        17.1,
        17.6,
    )
    assert found.helped is True and found.forgot is False
    assert found.sentence == (
        "It helped: schema_valid 0.21 -> 0.99, topic_accuracy 0.35 -> 0.80; general perplexity rose 3% (17.1 -> 17.6)."
    )
    assert found.findings[0].startswith("schema_valid rose by 0.78, 0.21 -> 0.99 on 100 rows (95% interval +0.7")
    assert found.findings[2] == "General perplexity rose 3% (17.1 -> 17.6)."
    assert found.differences["schema_valid"].value == pytest.approx(0.78)


def test_helped_but_forgot_says_both():
    found = verdict({"m": share(10)}, {"m": share(90)}, 17.1, 25.0)
    assert found.helped is True and found.forgot is True
    assert found.sentence == "It helped: m 0.10 -> 0.90; forgetting: general perplexity rose 46% (17.1 -> 25.0)."


def test_no_difference_beyond_noise():
    generator = np.random.default_rng(0)
    before, after = generator.integers(0, 2, size=(2, 99))
    found = verdict({"exact_match": score(before)}, {"exact_match": score(after)})
    assert found.helped is None
    assert found.sentence.startswith("No difference beyond noise on 99 held-out rows: exact_match 0.")
    assert "no difference beyond noise" in found.findings[0] and found.forgot is None


def test_worse():
    found = verdict({"chrf": score([60.0] * 50, 100.0)}, {"chrf": score([30.0] * 50, 100.0)}, 17.0, 17.05)
    assert found.helped is False
    assert found.sentence == (
        "It made things worse: chrf 60.0 -> 30.0; general perplexity unchanged within 1% (17.0 -> 17.1)."
    )
    assert found.findings[0] == "chrf fell by 30.0, 60.0 -> 30.0 on 50 rows (95% interval -30.0 to -30.0)."


def test_mixed():
    found = verdict({"a": share(10), "b": share(90)}, {"a": share(90), "b": share(10)})
    assert found.helped is None
    assert found.sentence == "Mixed: a 0.10 -> 0.90 rose, but b 0.90 -> 0.10 fell."


def test_too_few_rows_claim_nothing():
    found = verdict({"m": share(0, 5)}, {"m": share(5, 5)})
    assert found.helped is None
    assert found.sentence == "Cannot tell from 5 held-out rows, at least 20 are needed: m 0.00 -> 1.00."
    assert found.findings == ["m: 0.00 -> 1.00 on 5 rows, too few to tell a change from noise."]


def test_without_a_base_nothing_is_compared():
    found = verdict(None, {"m": share(80)}, None, 17.6)
    assert found.helped is None and found.differences == {}
    assert found.sentence == "Not compared: the base model was not evaluated; general perplexity 17.6."
    assert found.findings == ["m: 0.80", "General perplexity 17.6."]


def test_metrics_without_a_counterpart_are_not_compared():
    found = verdict({"a": share(10)}, {"b": share(90)})
    assert found.helped is None and "no metric in common" in found.sentence


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_model_never_helped(broken):
    found = verdict({"m": share(10)}, {"m": share(90)}, 17.1, broken)
    assert found.helped is False and found.forgot is True and found.sentence.startswith("It broke the model")


def test_different_rows_are_refused():
    with pytest.raises(DataError, match="same rows"):
        verdict({"m": share(10, 50)}, {"m": share(10, 51)})


@pytest.mark.parametrize(
    "before, after, words",
    [
        (17.1, 17.1, "unchanged within 1%"),
        (20.0, 21.9, "rose 9% (20.0 -> 21.9)"),
        (20.0, 22.1, "forgetting: general perplexity rose 10%"),
        (20.0, 18.0, "fell 10%"),
        (20.0, 2000.0, "(20.0 -> 2,000)"),
    ],
)
def test_perplexity_in_words(before, after, words):
    assert words in perplexity_finding(before, after)


def test_perplexity_that_was_not_measured():
    assert perplexity_finding(17.1, None) is None


@pytest.mark.parametrize(
    "value, best, text",
    [
        (0.5, 1.0, "0.50"),
        (1.0, 1.0, "1.00"),
        (0.0, 1.0, "0.00"),
        (398 / 399, 1.0, "0.997"),
        (0.001, 1.0, "0.001"),
        (45.06, 100.0, "45.1"),
        (99.99, 100.0, "99.99"),
        (1e-9, 1.0, "0.0000"),
    ],
)
def test_scores_are_not_rounded_to_perfect_or_zero(value, best, text):
    assert format_score(value, best) == text


def test_perplexities_above_a_thousand_lose_their_decimal():
    assert (format_perplexity(17.06), format_perplexity(1234.5)) == ("17.1", "1,234")
