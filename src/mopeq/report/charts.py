"""Plots with two axes: the size and quality frontier, predicted against measured loss, coverage of calibration."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from mopeq.report.inputs import Point
from mopeq.report.maps import number

__all__ = ["Plot", "coverage", "frontier", "megabytes", "prediction", "rank_correlation"]

_Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""
WIDTH, HEIGHT = 420, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 412, 12, 274
CHARACTER = 6.2
"""Width of a label's character in plot units."""


@dataclass(frozen=True)
class Mark:
    """A point in plot units; ``low`` and ``high`` end its vertical bar, ``label`` stands at ``label_at``."""

    x: float
    y: float
    kind: str
    title: str
    low: float | None = None
    high: float | None = None
    label: str = ""
    label_at: tuple[float, float, str] = (0.0, 0.0, "start")


@dataclass(frozen=True)
class Plot:
    """A picture to draw, all in units of its ``viewBox``."""

    name: str
    title: str
    caption: str
    x_label: str
    y_label: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    marks: tuple[Mark, ...]
    line: str = ""
    """Points of a polyline beneath the marks."""
    rule: tuple[float, str] | None = None
    """A horizontal line and its label."""
    kinds: tuple[tuple[str, str], ...] = ()
    """(kind of mark, its meaning) for the legend"""
    width: int = WIDTH
    height: int = HEIGHT
    box: tuple[int, int, int, int] = (LEFT, TOP, RIGHT, BOTTOM)


@dataclass(frozen=True)
class _Axis:
    """A scale from values to plot units."""

    at: Callable[[float], float]
    ticks: tuple[tuple[float, str], ...]


def frontier(points: Sequence[Point]) -> Plot | None:
    """KL against bytes, KL on a logarithmic axis; None where fewer than two points have both."""
    shown = [p for p in points if p.bytes is not None and p.kl is not None and p.kl > 0]
    if len(shown) < 2:
        return None
    sizes = [p.bytes for p in shown if p.bytes is not None]
    unit, factor = ("GB", 1e9) if max(sizes) >= 2e9 else ("MB", 1e6)
    x = _linear([s / factor for s in sizes], LEFT, RIGHT, pad=0.12)
    y = _logarithmic(_ends(shown), BOTTOM, TOP)
    marks = [_mark(p, x.at((p.bytes or 0) / factor), y) for p in shown]
    uniform = sorted((m.x, m.y) for m, p in zip(marks, shown, strict=True) if p.kind == "uniform")
    left_out = [p for p in points if p.kind == "original" and p.bytes is not None and p not in shown]
    caption = "Bars are 95 % intervals over windows of text. Lower and further left is better."
    for p in left_out:
        caption += f" Not on these axes: {p.name}, {megabytes(p.bytes)}, KL 0."
    return Plot(
        name="frontier",
        title="Size against quality",
        caption=caption,
        x_label=f"size on disk, {unit}",
        y_label="KL to the original, nats per token",
        x_ticks=x.ticks,
        y_ticks=y.ticks,
        marks=_labelled(marks),
        line=" ".join(f"{a:.1f},{b:.1f}" for a, b in uniform) if len(uniform) > 1 else "",
        kinds=_kinds(shown),
    )


def prediction(points: Sequence[Point]) -> Plot | None:
    """Measured KL against predicted loss, both logarithmic; None where fewer than two points have both."""
    shown = [p for p in points if p.predicted_loss and p.predicted_loss > 0 and p.kl and p.kl > 0]
    if len(shown) < 2:
        return None
    predicted = [p.predicted_loss or 0.0 for p in shown]
    x = _logarithmic(predicted, LEFT, RIGHT)
    y = _logarithmic(_ends(shown), BOTTOM, TOP)
    marks = [_mark(p, x.at(v), y) for p, v in zip(shown, predicted, strict=True)]
    caption = (
        "A prediction is the sum of the costs of the chosen precisions; it need only rank models as measuring does."
    )
    if len(shown) >= 4:
        rank = rank_correlation(predicted, [p.kl or 0.0 for p in shown])
        caption += f" Spearman rank correlation {rank:.2f} over {len(shown)} models."
    return Plot(
        name="prediction",
        title="Predicted against measured loss",
        caption=caption,
        x_label="predicted loss",
        y_label="measured KL, nats per token",
        x_ticks=x.ticks,
        y_ticks=y.ticks,
        marks=_labelled(marks),
        kinds=_kinds(shown),
    )


def coverage(tokens: Mapping[int, Sequence[float]], enough: float | None) -> Plot:
    """Tokens of the experts of each layer: least, median and most, on a logarithmic axis with 0 at one half."""
    rows = {layer: [max(v, 0.5) for v in row] for layer, row in tokens.items()}
    values = [v for row in rows.values() for v in row] + ([enough] if enough else [])
    y = _logarithmic(values, BOTTOM, TOP)
    layers = list(rows)
    space = (RIGHT - LEFT) / len(layers)
    every = math.ceil(len(layers) / 12)
    marks = []
    for place, (layer, row) in enumerate(rows.items()):
        least, middle, most = min(row), statistics.median(row), max(row)
        title = f"layer {layer}: least {min(tokens[layer]):,.0f}, median {middle:,.0f}, most {most:,.0f} tokens"
        at = LEFT + (place + 0.5) * space
        marks.append(Mark(at, y.at(middle), "range", title, y.at(least), y.at(most)))
    ticks = tuple(tick for tick in y.ticks if tick[0] <= y.at(1) + 1)
    if any(v == 0 for row in tokens.values() for v in row):
        ticks += ((y.at(0.5), "0"),)
    return Plot(
        name="coverage",
        title="Calibration tokens of an expert",
        caption="From the expert of a layer with the fewest tokens to the one with the most; the dot is the median.",
        x_label="layer",
        y_label="tokens routed to an expert",
        x_ticks=tuple((LEFT + (i + 0.5) * space, str(k)) for i, k in enumerate(layers) if i % every == 0),
        y_ticks=ticks,
        marks=tuple(marks),
        rule=(y.at(enough), f"enough: {enough:,.0f}") if enough else None,
    )


def megabytes(size: float | None) -> str:
    """``14.2 MB`` or ``1.43 GB``, powers of ten."""
    if size is None:
        return "unknown size"
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation, ties at their mean rank; 0 where one side is constant."""
    a, b = _ranks(first), _ranks(second)
    if len(set(a)) < 2 or len(set(b)) < 2:
        return 0.0
    return statistics.correlation(a, b)


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]


def _ends(points: Iterable[Point]) -> list[float]:
    """All KL values and interval ends above zero."""
    return [v for p in points for v in (p.kl, p.kl_low, p.kl_high) if v is not None and v > 0]


def _kinds(points: Sequence[Point]) -> tuple[tuple[str, str], ...]:
    names = {"uniform": "one precision for all experts", "mixed": "a precision for each", "original": "original"}
    return tuple((kind, names[kind]) for kind in names if any(p.kind == kind for p in points))


def _mark(point: Point, x: float, y: _Axis) -> Mark:
    kl = point.kl or 0.0
    title = f"{point.name}: KL {number(kl)}"
    if point.kl_low is not None and point.kl_high is not None:
        title += f" ({number(point.kl_low)} to {number(point.kl_high)})"
    title += f", {megabytes(point.bytes)}" if point.bytes is not None else ""
    low, high = (y.at(v) if v is not None and v > 0 else None for v in (point.kl_low, point.kl_high))
    return Mark(x, y.at(kl), point.kind, title, low, high, point.name)


def _labelled(marks: Sequence[Mark]) -> tuple[Mark, ...]:
    """Labels beside their points: where they cover nothing, else where they cover only bars, else left out."""
    points = [(m.x - 5, m.y - 5, m.x + 5, m.y + 5) for m in marks]
    bars = [(m.x - 3, m.high, m.x + 3, m.low) for m in marks if m.low is not None and m.high is not None]
    labels: list[_Box] = []
    placed = []
    for mark in marks:
        found = _label_place(mark, [*points, *bars, *labels]) or _label_place(mark, [*points, *labels])
        if found is None:
            placed.append(replace(mark, label=""))
        else:
            labels.append(found[1])
            placed.append(replace(mark, label_at=found[0]))
    return tuple(placed)


def _label_place(mark: Mark, taken: Sequence[_Box]) -> tuple[tuple[float, float, str], _Box] | None:
    """Where a label fits inside the frame, and the box it takes: right, left, then the four corners of its point."""
    width = len(mark.label) * CHARACTER
    for right, down in ((1, 4), (-1, 4), (1, -9), (1, 16), (-1, -9), (-1, 16)):
        x, y = mark.x + right * (9 if down == 4 else 7), mark.y + down
        left = x if right == 1 else x - width
        box = (left, y - 10, left + width, y + 3)
        inside = box[0] >= LEFT and box[2] <= RIGHT and box[1] >= TOP - 8 and box[3] <= BOTTOM
        if inside and not any(_overlap(box, other) for other in taken):
            return (x, y, "start" if right == 1 else "end"), box
    return None


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _linear(values: Sequence[float], start: float, end: float, pad: float) -> _Axis:
    low, high = min(values), max(values)
    room = (high - low or high or 1.0) * pad
    low, high = max(0.0, low - room), high + room
    step = _nice((high - low) / 5)
    first = math.ceil(low / step)
    at = [first * step + i * step for i in range(int((high - first * step) / step + 1e-9) + 1)]

    def place(value: float) -> float:
        return start + (value - low) / (high - low) * (end - start)

    return _Axis(place, tuple((place(v), f"{v:.10g}") for v in at))


def _nice(step: float) -> float:
    scale = 10.0 ** math.floor(math.log10(step))
    return next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= step)


def _logarithmic(values: Sequence[float], start: float, end: float) -> _Axis:
    low, high = math.log10(min(values)), math.log10(max(values))
    room = max(0.08 * (high - low), 0.08)
    low, high = low - room, high + room
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        decades = range(math.floor(low), math.ceil(high) + 1)
        at = [m * 10.0**d for d in decades for m in steps if low <= math.log10(m * 10.0**d) <= high]
        if len(at) <= 7:
            break
    at = at[:: math.ceil(len(at) / 7)]

    def place(value: float) -> float:
        return start + (math.log10(value) - low) / (high - low) * (end - start)

    return _Axis(place, tuple((place(v), f"{v:,.10g}" if 1e-4 <= v < 1e6 else f"{v:.0e}") for v in at))
