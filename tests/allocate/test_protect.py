"""Super-experts: found by their outputs' peaks, and given the best precision on offer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mopeq.allocate import allocate, super_experts
from mopeq.allocate.protect import PEAK, super_sentence
from mopeq.evaluate import Divergence
from mopeq.evaluate.bootstrap import ratio_estimate
from mopeq.precision import GROUPS, PrecisionMap
from mopeq.refine import refined
from mopeq.stats import Stats
from tables import OPTIONS, P2, P4, measured, model


def planted(*, times: float = 400.0, seed: int = 0) -> Stats:
    """Peaks drawn as those of ordinary models are, up to a few times the median, but that of expert 1.3."""
    stats = measured(model(4, 64), seed=seed)
    draw = np.random.default_rng(seed)
    peaks = {layer: draw.lognormal(2, 0.5, count) for layer, count in stats.model.experts.items()}
    median = float(np.median(np.concatenate(list(peaks.values()))))
    peaks[1][3] = times * median
    return stats.with_metrics({PEAK: {layer: row.tolist() for layer, row in peaks.items()}})


def test_only_the_planted_one_is_found() -> None:
    for seed in range(5):
        found = super_experts(planted(seed=seed))
        assert list(found) == ["1.3"]
        assert found["1.3"] == pytest.approx(400, rel=0.05)
        assert super_experts(planted(times=8, seed=seed)) == {}
    assert super_sentence({"1.3": 400.2}) == "1 super-expert by the peak of their output: 1.3 (400 times the median)"
    assert super_experts(measured()) == {}, "not measured"
    silent = measured(model(2, 8)).with_metrics({PEAK: {0: [0.0] * 8, 1: [0.0] * 8}})
    assert super_experts(silent) == {}, "no tokens"


def test_it_gets_the_most_bits_on_offer_within_the_budget() -> None:
    stats = planted()
    for group in GROUPS:  # nothing in its measured cost asks for bits
        for p in OPTIONS:
            rows = {k: list(row) for k, row in stats.metrics[f"fisher_error/{group}/{p}"].items()}
            rows[1][3] = 1e-12
            stats = stats.with_metrics({f"fisher_error/{group}/{p}": rows})
    made, left = (allocate(stats, budget="3.3bpw", protect=protect) for protect in (True, False))
    assert [made.of(1, 3, group) for group in GROUPS] == [P4, P4]
    assert [left.of(1, 3, group) for group in GROUPS] == [P2, P2]
    assert made.note["super_experts"] == ["1.3"]
    assert "super_experts" not in left.note
    assert stats.model.expert_bits(made) <= 3.3
    capped = allocate(stats, budget="2.9bpw", ceilings={1: 3})
    assert {capped.of(1, 3, group).bits for group in GROUPS} == {3}, "the most that its layer may have"
    whole = allocate(stats, budget="3.3bpw", uniform_layers=True)
    assert all(len(set(row)) == 1 for rows in whole.experts.values() for row in rows.values())


def test_exchanges_leave_it_alone() -> None:
    stats = planted()
    made = allocate(stats, budget="3.3bpw")
    tried: list[PrecisionMap] = []

    def judge(precisions: PrecisionMap) -> Divergence:
        tried.append(precisions)
        estimate: Any = ratio_estimate([1.0] * 8, [1] * 8)
        return Divergence(estimate, estimate, 8, "same", (1,) * 8, (1.0,) * 8, (1,) * 8)

    refined(made, stats, "fisher_error", OPTIONS, judge, 300)
    assert len(tried) > 20
    assert {tuple(found.of(1, 3, group) for group in GROUPS) for found in tried} == {(P4, P4)}
