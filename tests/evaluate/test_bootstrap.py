"""Intervals over windows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mopeq.errors import DataError
from mopeq.evaluate.bootstrap import Estimate, difference_estimate, ratio_estimate


def test_value_is_the_ratio_of_sums() -> None:
    found = ratio_estimate([1.0, 4.0], [1, 3])
    assert found.value == 5 / 4
    assert found.low is not None
    assert found.high is not None
    assert 1.0 <= found.low <= found.value <= found.high <= 4 / 3


def test_one_window_has_no_interval() -> None:
    assert ratio_estimate([3.0], [2]) == Estimate(1.5, None, None)


def test_equal_windows_have_an_interval_of_no_width() -> None:
    found = ratio_estimate([2.0] * 9, [4] * 9)
    assert (found.low, found.high) == (0.5, 0.5)


def test_seed_decides() -> None:
    totals, counts = [1.0, 2.0, 5.0, 3.0], [2, 2, 3, 2]
    assert ratio_estimate(totals, counts, seed=3) == ratio_estimate(totals, counts, seed=3)
    assert ratio_estimate(totals, counts, seed=3) != ratio_estimate(totals, counts, seed=4)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    hits, trials = 0, 300
    for trial in range(trials):
        counts = rng.integers(50, 100, 40)
        found = ratio_estimate((counts * rng.exponential(2.0, 40)).tolist(), counts.tolist(), seed=trial, resamples=300)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 2.0 <= found.high
    assert 0.88 < hits / trials < 0.98


def test_interval_matches_the_normal_one_for_many_windows() -> None:
    values = np.random.default_rng(1).normal(3.0, 1.0, 400)
    found = ratio_estimate(values.tolist(), [1] * 400)
    error = 1.96 * values.std() / math.sqrt(400)
    assert found.low == pytest.approx(values.mean() - error, abs=0.25 * error)
    assert found.high == pytest.approx(values.mean() + error, abs=0.25 * error)


def test_pairing_takes_out_what_windows_share() -> None:
    rng = np.random.default_rng(2)
    hard = rng.normal(3.0, 1.0, 60)
    a, b = hard + 0.02 + rng.normal(0, 0.01, 60), hard
    found = difference_estimate(a.tolist(), b.tolist(), [1] * 60)
    assert found.value == pytest.approx(0.02, abs=0.004)
    assert found.excludes_zero
    alone = [ratio_estimate(x.tolist(), [1] * 60) for x in (a, b)]
    assert alone[0].low < alone[1].high  # type: ignore[operator]
    assert not difference_estimate(b.tolist(), b.tolist(), [1] * 60).excludes_zero


def test_through_maps_the_interval() -> None:
    assert Estimate(0.0, -1.0, 1.0).through(math.exp) == Estimate(1.0, math.exp(-1), math.e)
    assert Estimate(0.0).through(math.exp) == Estimate(1.0)


def test_no_tokens_and_uneven_columns_are_errors() -> None:
    with pytest.raises(DataError, match="no token was scored"):
        ratio_estimate([], [])
    with pytest.raises(DataError, match="2 totals for 1 windows"):
        ratio_estimate([1.0, 2.0], [1])
