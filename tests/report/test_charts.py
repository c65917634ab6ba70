"""Axes, labels, colours and numbers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from mopeq.precision import Precision
from mopeq.report.charts import BOTTOM, LEFT, RIGHT, TOP, coverage, frontier, megabytes, prediction, rank_correlation
from mopeq.report.inputs import Point
from mopeq.report.maps import TONES, bit_map, number, scale, value_map


def point(name: str, kind: str, size: float | None, kl: float | None, loss: float | None = None) -> Point:
    low, high = (None, None) if kl is None else (kl * 0.9, kl * 1.1)
    return Point(name, kind, None, size, None, None, kl, low, high, None, loss)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.floats(1e3, 1e12), st.floats(1e-7, 10.0)), min_size=2, max_size=9))
def test_everything_stays_inside_the_frame(pairs: list[tuple[float, float]]) -> None:
    plot = frontier([point(f"m{i}", "mixed", s, kl) for i, (s, kl) in enumerate(pairs)])
    assert plot is not None
    for mark in plot.marks:
        assert LEFT <= mark.x <= RIGHT
        assert mark.high is not None
        assert mark.low is not None
        assert TOP <= mark.high <= mark.y <= mark.low <= BOTTOM
    assert 1 <= len(plot.y_ticks) <= 8
    assert 1 <= len(plot.x_ticks) <= 9
    assert all(LEFT - 1e-6 <= x <= RIGHT + 1e-6 for x, _ in plot.x_ticks)
    assert all(TOP - 1e-6 <= y <= BOTTOM + 1e-6 for y, _ in plot.y_ticks)


def test_the_kl_axis_is_logarithmic() -> None:
    plot = frontier([point(str(i), "uniform", 1e6 * i, 10.0**-i) for i in (1, 2, 3)])
    assert plot is not None
    a, b, c = (m.y for m in plot.marks)
    assert b - a == pytest.approx(c - b)
    ticks = {text: y for y, text in plot.y_ticks}
    assert ticks["0.01"] == pytest.approx(b)
    assert plot.line.count(",") == 3


def test_the_original_is_named_where_it_cannot_be_drawn() -> None:
    plot = frontier(
        [point("original", "original", 5e7, 0.0), point("a", "mixed", 1e7, 0.1), point("b", "uniform", 2e7, 0.2)]
    )
    assert plot is not None
    assert "Not on these axes: original, 50.0 MB, KL 0" in plot.caption
    assert [kind for kind, _ in plot.kinds] == ["uniform", "mixed"]


def test_too_few_points_make_no_plot() -> None:
    assert (
        frontier([point("a", "mixed", 1e6, 0.1), point("b", "mixed", None, 0.1), point("c", "mixed", 1e6, 0.0)]) is None
    )
    assert prediction([point("a", "mixed", 1e6, 0.1, 0.2), point("b", "mixed", 1e6, 0.1)]) is None


def test_labels_do_not_cover_each_other() -> None:
    plot = frontier([point(f"a long name {i}", "mixed", 1e7 + 1e4 * i, 0.1 + 1e-4 * i) for i in range(12)])
    assert plot is not None
    shown = [m for m in plot.marks if m.label]
    assert 0 < len(shown) < 12
    boxes = []
    for m in shown:
        x, y, anchor = m.label_at
        width = 6.2 * len(m.label)
        left = x - width if anchor == "end" else x
        boxes.append((left, y - 10, left + width, y + 3))
    for i, a in enumerate(boxes):
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:i])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=12))
def test_rank_correlation_is_spearmans(pairs: list[tuple[int, int]]) -> None:
    a, b = ([float(p[i]) for p in pairs] for i in (0, 1))
    if len(set(a)) > 1 and len(set(b)) > 1:
        assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-9)
    else:
        assert rank_correlation(a, b) == 0.0


def test_coverage_shows_zero_below_one() -> None:
    plot = coverage({0: (0.0, 10.0, 100.0), 1: (5.0, 10.0, 100.0)}, 8.0)
    zero = {text: y for y, text in plot.y_ticks}["0"]
    assert plot.marks[0].low == pytest.approx(zero)
    assert plot.marks[0].title == "layer 0: least 0, median 10, most 100 tokens"
    assert plot.rule is not None
    assert plot.rule[1] == "enough: 8"
    assert coverage({0: (3.0,)}, None).rule is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.012345, "0.0123"), (1.5, "1.50"), (12.34, "12.3"), (999.4, "999"), (1234.5, "1,234"),
     (1e-5, "1.00e-05"), (-0.5, "-0.500")],
)  # fmt: skip
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_sizes_are_decimal() -> None:
    assert [megabytes(v) for v in (123456, 14.2e6, 1.43e9, None)] == ["0.1 MB", "14.2 MB", "1.43 GB", "unknown size"]


def test_bits_share_colours_and_a_legend() -> None:
    levels = [Precision(2, 64), Precision(3, 64), Precision(3, 128)]
    drawn = bit_map("b", "t", "c", {0: levels, 4: levels[::-1]}, levels)
    assert [s.label for s in drawn.legend] == ["2g64", "3g64", "3g128"]
    assert [s.tone for s in drawn.legend] == ["t0", f"t{round((TONES - 1) / 2)}", f"t{TONES - 1}"]
    assert [[c.tone for c in cells] for _, _, cells in drawn.rows] == [
        [s.tone for s in drawn.legend], [s.tone for s in drawn.legend][::-1]
    ]  # fmt: skip
    assert [label for _, label, _ in drawn.rows] == ["0", "4"]


def test_colours_grow_with_values() -> None:
    rows = {0: [0.0, 1.0, 2.0, 4.0, 8.0]}
    drawn = value_map("v", "cost", "t", "c", rows, scale(rows), lambda i, e: str(rows[i][e]), "none seen")
    first, *rest = (c.tone for c in drawn.rows[0][2])
    assert first == "none"
    assert drawn.legend[-1].label == "none seen"
    steps = [int(t[1:]) for t in rest]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, TONES - 1)
    assert drawn.progression == "linear"


def test_a_wide_range_is_logarithmic_and_spares_its_tail() -> None:
    rows = {0: [1e-12] + [10.0 ** (-4 + 4 * i / 198) for i in range(199)]}
    low, high, logarithmic = scale(rows)
    assert logarithmic
    assert (low, high) == (pytest.approx(10 ** (-4 + 4 * 3 / 198)), 1.0)
    drawn = value_map("v", "cost", "t", "c", rows, (low, high, logarithmic), lambda i, e: "", "z")
    assert drawn.legend[0].label.endswith(" or less")
    assert drawn.rows[0][2][0].tone == "t0"
    assert math.isclose(high, 1.0)


def test_equal_values_take_the_middle() -> None:
    rows = {0: [3.0, 3.0]}
    drawn = value_map("v", "use", "t", "c", rows, scale(rows), lambda i, e: "", "z")
    assert {c.tone for c in drawn.rows[0][2]} == {f"t{TONES // 2}"}
