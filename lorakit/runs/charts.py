"""The report's two drawings, written as SVG by hand: a loss curve and a dot with whiskers.

A report may be opened offline, years later, from a mail attachment, so it needs no plotting library, script or font.
The page's style sheet sets the colors (classes `base`, `tuned`, `train`, `held-out`) in a light and a dark set. Shapes
differ as well, so that no distinction rests on color alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from markupsafe import Markup, escape

MOST_POINTS = 400  # points in a curve; longer logs are averaged in stretches of equal length


@dataclass(frozen=True)
class Dot:
    """A value and its interval, drawn as one line of `interval_plot`; `kind` is the style sheet's class."""

    kind: str
    label: str
    value: float
    interval: tuple[float, float] | None
    text: str


def interval_plot(title: str, dots: Sequence[Dot], top: float) -> Markup:
    """Draw each dot with its whiskers on one axis from 0 to `top`; the style sheet fills the tuned model's dot."""
    left, right, line, width = 54, 304, 26, 320
    bottom = line * len(dots) + 6

    def x(value: float) -> float:
        return left + (right - left) * min(max(value / top, 0.0), 1.0)

    parts = []
    for tick in nice_ticks(0.0, top, 4):
        parts.append(_line("grid", x(tick), 4, x(tick), bottom))
        parts.append(_text("tick", x(tick), bottom + 15, format_tick(tick), "middle"))
    for index, dot in enumerate(dots):
        y = 18 + line * index
        parts.append(_text(f"label {dot.kind}", 0, y + 4, dot.label))
        if dot.interval is not None:
            low, high = x(dot.interval[0]), x(dot.interval[1])
            parts.append(_line(f"whisker {dot.kind}", low, y, high, y))
            parts += [_line(f"whisker {dot.kind}", end, y - 4, end, y + 4) for end in (low, high)]
        parts.append(Markup('<circle class="dot {}" cx="{:.1f}" cy="{}" r="4.5"/>').format(dot.kind, x(dot.value), y))
    summary = title + ": " + "; ".join(f"{dot.label} {dot.text}" for dot in dots)
    return _svg("interval", width, bottom + 20, summary, parts)


def loss_curve(steps: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Draw the loss of every step (thin), smoothed (thick) and on held-out records (diamonds); None without two points.

    Args:
        steps: lines of train.jsonl: "step", "loss" and, where evaluated, "eval_loss". Values that are not finite are
            left out.
    """
    train = _finite(steps, "loss")
    held_out = _finite(steps, "eval_loss")
    if len(train) < 2:
        return None
    smooth = thinned(list(zip([step for step, _ in train], smoothed([loss for _, loss in train]), strict=True)))
    shown = thinned(train)
    losses = [loss for _, loss in [*shown, *smooth, *held_out]]
    y_ticks = nice_ticks(min(losses), max(losses), 5, outer=True)
    first, last = train[0][0], max(train[-1][0], held_out[-1][0] if held_out else 0)
    width, height, left, right, top, bottom = 760, 326, 56, 740, 14, 270

    def at(point: tuple[float, float]) -> tuple[float, float]:
        across = (point[0] - first) / (last - first)
        up = (point[1] - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return left + (right - left) * across, bottom - (bottom - top) * up

    parts = []
    for tick in y_ticks:
        y = at((first, tick))[1]
        parts += [_line("grid", left, y, right, y), _text("tick", left - 10, y + 4, format_tick(tick), "end")]
    for tick in nice_ticks(first, last, 6):
        x = at((tick, y_ticks[0]))[0]
        parts += [_line("axis", x, bottom, x, bottom + 5), _text("tick", x, bottom + 24, format_tick(tick), "middle")]
    parts.append(_line("axis", left, bottom, right, bottom))
    parts.append(_text("tick", right, bottom + 46, "step", "end"))
    parts.append(_polyline("curve raw", map(at, shown)))
    parts.append(_polyline("curve train", map(at, smooth)))
    if held_out:
        parts.append(_polyline("curve held-out", map(at, held_out)))
        parts += [_diamond(*at(point)) for point in held_out]
    return _svg("loss", width, height, loss_summary(steps), parts)


def loss_summary(steps: Sequence[Mapping[str, Any]]) -> str:
    """Describe in words what `loss_curve` draws; "" without a finite loss."""
    train, held_out = _finite(steps, "loss"), _finite(steps, "eval_loss")
    if not train:
        return ""
    smooth = smoothed([loss for _, loss in train])
    parts = [f"Training loss, smoothed, went from {smooth[0]:.3g} to {smooth[-1]:.3g} in {len(train):,} steps"]
    if held_out:
        parts.append(f"held-out loss from {held_out[0][1]:.3g} to {held_out[-1][1]:.3g}")
    return ", ".join(parts)


def nice_ticks(low: float, high: float, count: int, outer: bool = False) -> list[float]:
    """Return about `count` round numbers between `low` and `high`; with `outer`, also the two that enclose them.

    Steps are 1, 2, 2.5 or 5 times a power of ten.
    """
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * (1 - 1e-9))
    slack = 1e-9
    first, last = low / step, high / step
    start = math.floor(first + slack) if outer else math.ceil(first - slack)
    end = math.ceil(last - slack) if outer else math.floor(last + slack)
    return [round(index * step, 12) for index in range(start, end + 1)]


def format_tick(value: float) -> str:
    """Write a tick in full with as few digits as it needs: "1,000", "0.25", "2e-05"."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.3g}"
    return f"{value:,.6f}".rstrip("0").rstrip(".")


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the centered moving average over a twelfth of the values; unlike a running average it does not lag.

    Towards the ends the window narrows equally on both sides, so a falling curve keeps its first and last value.
    """
    reach = len(values) // 24
    sums = [0.0, *accumulate(values)]
    result = []
    for index in range(len(values)):
        side = min(reach, index, len(values) - 1 - index)
        result.append((sums[index + side + 1] - sums[index - side]) / (2 * side + 1))
    return result


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighbors so that at most `MOST_POINTS` remain; the last step keeps its place on the axis."""
    if len(points) <= MOST_POINTS:
        return list(points)
    stride = math.ceil(len(points) / MOST_POINTS)
    groups = [points[start : start + stride] for start in range(0, len(points), stride)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _finite(steps: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    points = []
    for step in steps:
        at, value = step.get("step"), step.get(key)
        if isinstance(at, int | float) and isinstance(value, int | float) and math.isfinite(value):
            points.append((float(at), float(value)))
    return points


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    template = Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>')
    return template.format(kind, x1, y1, x2, y2)


def _text(kind: str, x: float, y: float, text: str, anchor: str = "start") -> Markup:
    template = Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    return template.format(kind, x, y, anchor, text)


def _polyline(kind: str, points: Any) -> Markup:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return Markup('<polyline class="{}" points="{}"/>').format(kind, path)


def _diamond(x: float, y: float) -> Markup:
    path = f"M{x:.1f} {y - 5.5:.1f}l5.5 5.5-5.5 5.5-5.5-5.5z"
    return Markup('<path class="mark held-out" d="{}"/>').format(path)


def _svg(kind: str, width: float, height: float, summary: str, parts: Sequence[Markup]) -> Markup:
    opening = Markup('<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}">')
    return (
        opening.format(kind, width, height, summary)
        + Markup("").join(escape(part) for part in parts)
        + Markup("</svg>")
    )
