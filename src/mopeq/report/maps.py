"""Layer-by-expert pictures: one small cell per expert, coloured by a precision or by a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mopeq.precision import Precision

__all__ = ["TONES", "HeatMap", "Swatch", "bit_map", "number", "scale", "value_map"]

TONES = 12
"""Shades of a colour ramp; the page defines ``t0`` to ``t11`` for each ramp, light and dark."""

MARGIN_LEFT, MARGIN_TOP = 44, 31


@dataclass(frozen=True)
class Cell:
    """One expert: left edge, colour class, tooltip, and what is printed in it where there is room."""

    x: int
    tone: str
    title: str
    text: str = ""


@dataclass(frozen=True)
class Swatch:
    """An entry of a legend."""

    tone: str
    label: str


@dataclass(frozen=True)
class HeatMap:
    """A picture to draw: sizes in CSS pixels, rows of cells, labels along both edges."""

    name: str
    ramp: str
    title: str
    caption: str
    width: int
    height: int
    cell: tuple[int, int]
    rows: tuple[tuple[int, str, tuple[Cell, ...]], ...]
    """(top edge, layer label or nothing, cells)"""
    columns: tuple[tuple[float, str], ...]
    """(centre, expert label)"""
    legend: tuple[Swatch, ...]
    progression: str
    """``linear`` or ``logarithmic`` colours, or nothing where each colour is a level."""


def bit_map(
    name: str, title: str, caption: str, rows: Mapping[int, Sequence[Precision]], levels: Sequence[Precision]
) -> HeatMap:
    """Precisions; ``levels`` are all that occur in the model, so that both projection groups share colours."""
    tones = {p: f"t{_spread(i, len(levels))}" for i, p in enumerate(levels)}
    plain = len({p.bits for p in levels}) == len(levels)

    def cell(layer: int, expert: int) -> tuple[str, str, str]:
        precision = rows[layer][expert]
        return tones[precision], f"{layer}.{expert}: {precision.bits} bits ({precision})", str(precision.bits)

    legend = tuple(Swatch(tones[p], f"{p.bits} bits" if plain else str(p)) for p in levels)
    return _draw(name, "bits", title, caption, {k: len(v) for k, v in rows.items()}, cell, legend, "")


def value_map(
    name: str,
    ramp: str,
    title: str,
    caption: str,
    rows: Mapping[int, Sequence[float]],
    bounds: tuple[float, float, bool],
    label: Callable[[int, int], str],
    zero: str,
    unit: Callable[[float], str] | None = None,
) -> HeatMap:
    """Numbers on the scale ``bounds`` (:func:`scale`); experts at zero get a colour of their own, named ``zero``.

    ``label`` is the tooltip of a layer's expert; ``unit`` prints the ends of the legend.
    """
    low, high, logarithmic = bounds
    unit = unit or number

    def tone(value: float) -> str:
        if value <= 0:
            return "none"
        if high <= low:
            return f"t{TONES // 2}"
        share = math.log(value / low) / math.log(high / low) if logarithmic else (value - low) / (high - low)
        return f"t{min(TONES - 1, max(0, int(share * TONES)))}"

    def cell(layer: int, expert: int) -> tuple[str, str, str]:
        return tone(rows[layer][expert]), f"{layer}.{expert}: {label(layer, expert)}", ""

    swatches = [Swatch(f"t{i}", "") for i in range(TONES)]
    below = any(0 < v < low for row in rows.values() for v in row)
    swatches[0] = Swatch("t0", f"{unit(low)} or less" if below else unit(low))
    swatches[-1] = Swatch(f"t{TONES - 1}", unit(high))
    if any(v <= 0 for row in rows.values() for v in row):
        swatches.append(Swatch("none", zero))
    counts = {k: len(v) for k, v in rows.items()}
    note = "logarithmic" if logarithmic else "linear"
    return _draw(name, ramp, title, caption, counts, cell, tuple(swatches), note)


def scale(*maps: Mapping[int, Sequence[float]]) -> tuple[float, float, bool]:
    """Ends of a colour scale for maps that share it, and whether it is logarithmic.

    The ends are the least and greatest positive value; a logarithmic scale starts at the second percentile, so that a
    few experts that are hardly used do not take most of the colours.
    """
    values = sorted(v for rows in maps for row in rows.values() for v in row if v > 0) or [1.0]
    low, high = values[0], values[-1]
    if high <= 20 * low:
        return low, high, False
    return values[len(values) // 50], high, True


def number(value: float) -> str:
    """Three significant digits, without an exponent where that is short: ``0.0123``, ``1.2e-05``, ``1,234``."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 1e-4 <= abs(value) < 1000:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:.{digits}f}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.2e}"


def _spread(index: int, count: int) -> int:
    """Shade of level ``index`` of ``count``, from the lightest to the darkest."""
    return TONES // 2 if count == 1 else round(index * (TONES - 1) / (count - 1))


def _draw(
    name: str,
    ramp: str,
    title: str,
    caption: str,
    counts: Mapping[int, int],
    cell: Callable[[int, int], tuple[str, str, str]],
    legend: tuple[Swatch, ...],
    progression: str,
) -> HeatMap:
    experts = max(counts.values())
    wide = next((w for most, w in ((16, 21), (24, 18), (32, 15), (64, 8)) if experts <= most), 4)
    high = max(min(wide, 18), 6)
    roomy = wide >= 15
    gap = 1 if wide >= 8 else 0
    every = _label_step(len(counts), math.ceil(13 / high))
    rows = []
    for place, (layer, count) in enumerate(sorted(counts.items())):  # experts for images behind all others
        cells = []
        for expert in range(count):
            tone, tooltip, text = cell(layer, expert)
            cells.append(Cell(MARGIN_LEFT + expert * wide, tone, tooltip, text if roomy else ""))
        rows.append((MARGIN_TOP + place * high, str(layer) if place % every == 0 else "", tuple(cells)))
    step = _label_step(experts, math.ceil(26 / wide))
    columns = tuple((MARGIN_LEFT + (e + 0.5) * wide, str(e)) for e in range(0, experts, step))
    return HeatMap(
        name=name,
        ramp=ramp,
        title=title,
        caption=caption,
        width=MARGIN_LEFT + experts * wide + 8,
        height=MARGIN_TOP + len(counts) * high + 1,
        cell=(wide - gap, high - gap),
        rows=tuple(rows),
        columns=columns,
        legend=legend,
        progression=progression,
    )


def _label_step(count: int, least: int) -> int:
    """A round step between labels, at least ``least`` cells."""
    return next((s for s in (1, 2, 4, 8, 16, 32, 64) if s >= least), count)
