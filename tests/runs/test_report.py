"""Reports written from run folders that the evaluation itself filled, read back as a browser and a reader would."""

import itertools
import json
import math
import re
from dataclasses import asdict
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import DataError
from lorakit.evaluation import evaluate_outputs, metric_config, row_scores, scores_as_json, verdict
from lorakit.runs.charts import MOST_POINTS, format_tick, loss_curve, nice_ticks, smoothed, thinned
from lorakit.runs.report import EXAMPLES, write_report
from lorakit.runs.wording import duration, fenced, inline, shorten

HOSTILE = '</p><script>alert("x")</script> & <img src=x onerror=y> `` ``` | *bold*'
VOID = {"meta", "line", "circle", "path", "polyline", "br"}


class Page(HTMLParser):
    """Checks that tags nest and collects what a reader sees and what a browser would fetch."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text, self.attributes = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def write_run(folder, rows=40, right=30, with_base=True, steps=60):
    """Fill a run folder the way a run does, with outputs that are right on `right` rows after and a quarter before."""
    metrics = [metric_config("exact_match"), metric_config("chrf")]
    references = [f"answer number {index}" for index in range(rows)]
    base = [reference if index % 4 == 0 else HOSTILE for index, reference in enumerate(references)]
    tuned = [reference if index < right else "no idea" for index, reference in enumerate(references)]
    before, after = evaluate_outputs(base, references, metrics), evaluate_outputs(tuned, references, metrics)
    judged = verdict(before if with_base else None, after, 17.1 if with_base else None, 17.6)
    summary = {
        "title": "Numbers & <answers>",
        "model": {"path": "some/model", "quant_type": "nf4", "parameters": 1000, "trainable_parameters": 50},
        "base_prompted": scores_as_json(before, 17.1) if with_base else None,
        "tuned": scores_as_json(after, 17.6),
        "best": {name: score.best for name, score in after.items()},
        "verdict": asdict(judged),
        "counts": {"train": 160, "eval": rows, "steps": steps, "trained_tokens": 9000},
        "seconds": {"load": 1.5, "train": 90.0, "evaluate_base": None, "total": 4000.0},
        "peak_rss_mb": 900.4,
        "versions": {"lorakit": "0.1.0"},
        "data": {"notes": ["2 duplicates were removed."]},
    }
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(summary))
    (folder / "recipe.yaml").write_text("title: Numbers\nlora: {r: 16}\n")
    with open(folder / "predictions.jsonl", "w") as file:
        for index in range(rows):
            row = {
                "source": f"eval.jsonl:{index + 1}",
                "messages": [{"role": "system", "content": "Be exact."}, {"role": "user", "content": f"Say {index}."}],
                "reference": references[index],
                "base": base[index] if with_base else None,
                "tuned": tuned[index],
                "scores": {"base": row_scores(before, index) if with_base else None, "tuned": row_scores(after, index)},
            }
            file.write(json.dumps(row) + "\n")
    with open(folder / "train.jsonl", "w") as file:
        for step in range(1, steps + 1):
            line = {"step": step, "steps": steps, "loss": 3.0 / step, "lr": 1e-4}
            file.write(json.dumps(line | ({"eval_loss": 3.2 / step} if step % 20 == 0 else {})) + "\n")
    return summary


def reports(folder):
    html, markdown = write_report(folder)
    assert (html.name, markdown.name) == ("report.html", "report.md")
    return (
        Page(html.read_text(encoding="utf-8")),
        html.read_text(encoding="utf-8"),
        markdown.read_text(encoding="utf-8"),
    )


def test_report_says_what_the_run_did(tmp_path):
    summary = write_run(tmp_path / "run")
    page, html, markdown = reports(tmp_path / "run")
    sentence = summary["verdict"]["sentence"].replace(" -> ", " → ")
    assert sentence.startswith("It helped: exact_match 0.25 → 0.75, chrf")
    assert sentence in page.words and inline(sentence) in markdown
    low, high = summary["tuned"]["intervals"]["exact_match"]
    assert f"0.75 {low:.2f} to {high:.2f}" in page.words
    change = summary["verdict"]["differences"]["exact_match"]
    assert f"+0.50 +{change['low']:.2f} to +{change['high']:.2f}" in page.words
    assert (
        "| exact\\_match | 0.25 (" in markdown and f"+0.50 (+{change['low']:.2f} to +{change['high']:.2f})" in markdown
    )
    for words in ("17.1", "17.6", "+2.9%", "1 min 30 s", "1 h 6 min", "900 MB", "2 duplicates were removed.", "9,000"):
        assert words in page.words and words in markdown
    assert "lora: {r: 16}" in page.words and "lora: {r: 16}" in markdown
    assert f"lorakit chat {tmp_path / 'run'} --base" in page.words
    assert "Time, evaluate base" not in page.words
    assert len(html) < 250_000


def test_page_is_one_offline_accessible_file(tmp_path):
    write_run(tmp_path / "run")
    page, html, _ = reports(tmp_path / "run")
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "onerror", "onload"} & {name for name, _ in page.attributes}
    assert not re.search(r"url\(|@import|https?:", html)
    assert "default-src 'none'" in html and "prefers-color-scheme: dark" in html and ("lang", "en") in page.attributes
    assert page.tags.count("figure") == page.tags.count("figcaption") == 3
    drawings = re.findall(r"<svg class=.*?>", html)
    assert len(drawings) == 3 and all('role="img" aria-label="' in drawing for drawing in drawings)
    assert ("scope", "row") in page.attributes and ("scope", "col") in page.attributes


def test_what_a_model_wrote_is_shown_and_never_run(tmp_path):
    write_run(tmp_path / "run")
    page, html, markdown = reports(tmp_path / "run")
    assert " ".join(HOSTILE.split()) in page.words
    assert "<script" not in html and "Numbers & <answers>" in page.words
    assert "# Numbers & \\<answers\\>" in markdown
    assert f"````text\n{HOSTILE}\n````" in markdown


def test_examples_are_a_fixed_shuffle_with_the_shared_system_prompt_told_once(tmp_path):
    write_run(tmp_path / "one", right=30)
    write_run(tmp_path / "two", right=3)
    pages = [reports(tmp_path / name)[0].words for name in ("one", "two")]
    shown = [re.findall(r"eval\.jsonl:\d+", page) for page in pages]
    assert len(shown[0]) == EXAMPLES == len(set(shown[0]))
    assert shown[0] == shown[1] != sorted(shown[0], key=lambda source: int(source.split(":")[1]))
    assert pages[0].count("Be exact.") == 1
    assert "identical to the reference" in pages[0]


def test_short_run_shows_every_row(tmp_path):
    write_run(tmp_path / "run", rows=1, right=1, steps=1)
    page, _, markdown = reports(tmp_path / "run")
    assert "1 held-out example" in page.words and "Be exact." in page.words
    assert "Cannot tell from 1 held-out row, at least 20 are needed" in page.words
    assert "no training log" in page.words and "no training log" in markdown


def test_run_without_a_base_compares_nothing(tmp_path):
    write_run(tmp_path / "run", with_base=False)
    page, _, markdown = reports(tmp_path / "run")
    for text in (page.words, markdown):
        assert "The base model was not evaluated" in " ".join(text.split())
        assert "Base, strong prompt" not in text and "Difference" not in text


def test_bare_metrics_are_enough(tmp_path):
    (tmp_path / "metrics.json").write_text(
        '{"tuned": {"accuracy": 0.5, "tokens_until_end": 210, "perplexity_general": NaN}}'
    )
    page, _, markdown = reports(tmp_path)
    assert tmp_path.name in page.words and "This run was not judged." in page.words
    for text in (page.words, markdown):
        assert "0.50" in text and "210.0" in text and "no training log" in text and "no predictions" in text


@pytest.mark.parametrize(("best", "shown", "row"), [({"likeness": 100.0}, "0.5", "0.2"), ({}, "0.50", "0.25")])
def test_a_score_is_shown_on_the_scale_of_its_metric(tmp_path, best, shown, row):
    (tmp_path / "metrics.json").write_text(json.dumps({"tuned": {"likeness": 0.5}, "best": best}))
    prediction = {"reference": "x", "tuned": "y", "scores": {"tuned": {"likeness": 0.25}}}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(prediction) + "\n")
    words = reports(tmp_path)[0].words
    assert f"likeness {row} " in f"{words} " and f" {shown} " in words


def test_difference_is_computed_from_predictions_when_the_verdict_has_none(tmp_path):
    summary = write_run(tmp_path)
    expected = summary["verdict"].pop("differences")["chrf"]
    (tmp_path / "metrics.json").write_text(json.dumps(summary))
    cell = f'<span class="interval">+{expected["low"]:.1f} to +{expected["high"]:.1f}</span>'
    assert cell in reports(tmp_path)[1]
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "predictions.jsonl").write_text("".join(lines[:5]))  # no longer all the rows that were scored
    assert cell not in reports(tmp_path)[1]


def test_forgetting_is_said_in_the_label(tmp_path):
    summary = write_run(tmp_path)
    summary["verdict"]["forgot"] = True
    (tmp_path / "metrics.json").write_text(json.dumps(summary))
    assert "Helped, but forgot" in reports(tmp_path)[0].words


def test_line_cut_off_by_a_crash_is_skipped_and_broken_losses_are_counted(tmp_path):
    write_run(tmp_path)
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write('{"step": 61, "loss": NaN}\n{"step": 62, "lo')
    page = reports(tmp_path)[0]
    assert "Left out: 1 without a finite loss." in page.words and "at step 60 of 61" in page.words


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("metrics.json", None, "is missing"),
        ("metrics.json", "{", "cannot be read"),
        ("metrics.json", "[]", "expected a JSON object"),
        ("train.jsonl", '{"step": 1}\nnonsense\n', "train.jsonl:2"),
        ("predictions.jsonl", "3\n", "predictions.jsonl:1"),
    ],
)
def test_malformed_files_are_named_and_the_old_report_stays(tmp_path, name, content, words):
    write_run(tmp_path)
    write_report(tmp_path)
    old = (tmp_path / "report.html").read_bytes()
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == old


def test_long_and_unwritable_texts_are_cut_and_mended(tmp_path):
    write_run(tmp_path, rows=1)
    row = json.loads((tmp_path / "predictions.jsonl").read_text())
    row["tuned"] = "\ud800" + "x" * 4000
    (tmp_path / "predictions.jsonl").write_text(json.dumps(row) + "\n")
    assert "[…2,501 more characters]" in reports(tmp_path)[0].words


def test_loss_curve_points_lie_where_the_axes_say(tmp_path):
    svg = loss_curve([{"step": 1, "loss": 4.0}, {"step": 5, "loss": 2.0}, {"step": 11, "loss": 1.0}])
    [points] = re.findall(r'class="curve raw" points="(.*?)"', svg)
    (x1, y1), (x2, y2), (x3, y3) = (tuple(map(float, point.split(","))) for point in points.split())
    assert (x2 - x1) / (x3 - x1) == pytest.approx(0.4, abs=1e-3)
    assert (y2 - y1) / (y3 - y1) == pytest.approx(2 / 3, abs=1e-3)
    ticks = {label: float(y) - 4 for y, label in re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', svg)}
    assert ticks["4"] == pytest.approx(y1, abs=0.11) and ticks["1"] == pytest.approx(y3, abs=0.11)


def test_loss_curve_of_a_constant_loss_and_of_none():
    assert "polyline" in loss_curve([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 2.0}])
    assert loss_curve([{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.inf}]) is None
    assert loss_curve([]) is None


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 8))
def test_ticks_are_even_and_cover_the_range(low, width, count):
    high = low + width
    outer, inner = nice_ticks(low, high, count, outer=True), nice_ticks(low, high, count)
    slack = 1e-6 * max(abs(low), abs(high), 1e-6) + 1e-11
    assert outer[0] <= low + slack and outer[-1] >= high - slack
    assert all(low - slack <= tick <= high + slack for tick in inner)
    assert 1 <= len(outer) - 1 <= count + 2
    gaps = [after - before for before, after in itertools.pairwise(outer)]
    assert max(gaps) - min(gaps) <= slack


@pytest.mark.parametrize("value, text", [(0, "0"), (0.25, "0.25"), (1000.0, "1,000"), (2e-5, "2e-05"), (100, "100")])
def test_ticks_are_written_with_as_few_digits_as_they_need(value, text):
    assert format_tick(value) == text


def test_smoothing_keeps_lines_and_ends_and_evens_out_noise():
    line = [5.0 - 0.01 * step for step in range(300)]
    assert smoothed(line) == pytest.approx(line)
    zigzag = [1.0 + 0.5 * (-1) ** step for step in range(300)]
    assert max(abs(value - 1.0) for value in smoothed(zigzag)[20:-20]) < 0.05
    assert smoothed([3.0]) == [3.0] and smoothed([]) == []


@given(st.integers(1, 3000))
def test_thinning_averages_neighbors_and_keeps_the_last_step(count):
    points = [(float(step), float(step)) for step in range(count)]
    found = thinned(points)
    stride = math.ceil(count / MOST_POINTS)
    assert len(found) <= MOST_POINTS and found[-1][0] == count - 1
    assert found[0] == (min(stride, count) - 1, (min(stride, count) - 1) / 2)
    assert count > MOST_POINTS or found == points


@given(st.text(alphabet="`ab\n"))
def test_fence_cannot_be_closed_from_inside(text):
    lines = fenced(text).split("\n")
    fence = lines[0].removesuffix("text")
    assert lines[-1] == fence and len(fence) >= 3
    assert all(fence not in line for line in lines[1:-1])


@pytest.mark.parametrize(
    "seconds, text", [(0.84, "0.8 s"), (41.2, "41 s"), (59.7, "1 min 0 s"), (725, "12 min 5 s"), (3780, "1 h 3 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_shorten_leaves_short_texts_alone():
    assert shorten("x" * 1500) == "x" * 1500
