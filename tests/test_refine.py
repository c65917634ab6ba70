"""Exchanges are at equal bytes, tried in the order of the prediction, and stay where the judge says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mopeq.allocate import allocate
from mopeq.evaluate import Divergence
from mopeq.evaluate.bootstrap import ratio_estimate
from mopeq.measure import open_model
from mopeq.precision import GROUPS, Precision, PrecisionMap
from mopeq.refine import refined
from mopeq.stats import Stats, cost_metric

Make = Callable[..., Path]
OPTIONS = [Precision(bits, 32) for bits in (2, 3, 4)]


def drawn(opened: Any, seed: int) -> Stats:
    """Losses that fall fourfold with every bit, from a random one at 2 bits."""
    draw = np.random.default_rng(seed)
    metrics: dict[str, dict[int, list[float]]] = {}
    for group in GROUPS:
        for layer, count in opened.inventory.experts.items():
            size = draw.lognormal(0, 1, count)
            for precision in OPTIONS:
                name = cost_metric("fisher_error", group, precision)
                metrics.setdefault(name, {})[layer] = (size * 4.0 ** (2 - precision.bits)).tolist()
    return Stats(opened.inventory, {}, {}).with_metrics(metrics)


def loss(stats: Stats, precisions: PrecisionMap) -> float:
    return sum(
        stats.metrics[cost_metric("fisher_error", g, p)][layer][e]
        for g in GROUPS
        for layer, row in precisions.experts[g].items()
        for e, p in enumerate(row)
    )


def judged_by(truth: Stats, noise: float = 1e-4) -> Callable[[PrecisionMap], Divergence]:
    """A judge to whom the losses of ``truth`` are the divergence, with the same noise in every window for every map."""
    shape = np.random.default_rng(0).normal(0, noise, 32)

    def judge(precisions: PrecisionMap) -> Divergence:
        windows = tuple(10 * (loss(truth, precisions) + shape))
        estimate = ratio_estimate(windows, [10] * 32)
        return Divergence(estimate, estimate, 320, "same", (10,) * 32, windows, (10,) * 32)

    return judge


@pytest.mark.parametrize("granularity", ["group", "expert"])
def test_exchanges_lower_the_measured_divergence_at_equal_bytes(granularity: str, tiny_model: Make) -> None:
    opened = open_model(tiny_model("olmoe"))
    predicted, truth = drawn(opened, 0), drawn(opened, 1)
    made = allocate(predicted, budget="3.6bpw", options=OPTIONS, granularity=granularity)
    found = refined(made, predicted, "fisher_error", OPTIONS, judged_by(truth), 12, granularity=granularity)
    assert 0 < found.taken < found.tried <= 12
    assert found.after < found.before == pytest.approx(loss(truth, made), abs=1e-3)
    assert found.after == pytest.approx(loss(truth, found.precisions), abs=1e-3)
    assert opened.inventory.total_bytes(found.precisions) == opened.inventory.total_bytes(made)
    assert found.precisions.histogram() == made.histogram()
    assert found.precisions.note["exchanges"] == found.taken
    if granularity == "expert":
        assert found.precisions.experts["gate_up"] == found.precisions.experts["down"]


def test_a_map_that_is_best_stays(tiny_model: Make) -> None:
    opened = open_model(tiny_model("olmoe"))
    stats = drawn(opened, 0)
    made = allocate(stats, budget="3.6bpw", options=OPTIONS)
    found = refined(made, stats, "fisher_error", OPTIONS, judged_by(stats), 8)
    assert (found.taken, found.tried) == (0, 8)
    assert found.precisions.experts == made.experts


def test_the_least_predicted_rise_comes_first(tiny_model: Make) -> None:
    opened = open_model(tiny_model("olmoe"))
    stats = drawn(opened, 2)
    made = allocate(stats, budget="3.6bpw", options=OPTIONS)
    rises: list[float] = []
    judge = judged_by(stats)

    def noted(precisions: PrecisionMap) -> Divergence:
        rises.append(loss(stats, precisions) - loss(stats, made))
        return judge(precisions)

    refined(made, stats, "fisher_error", OPTIONS, noted, 3)
    flat = [(g, layer, e) for g in GROUPS for layer, n in opened.inventory.experts.items() for e in range(n)]
    at = {u: made.of(u[1], u[2], u[0]) for u in flat}  # type: ignore[arg-type]
    every = sorted(
        stats.metrics[cost_metric("fisher_error", u[0], at[v])][u[1]][u[2]]
        + stats.metrics[cost_metric("fisher_error", v[0], at[u])][v[1]][v[2]]
        - stats.metrics[cost_metric("fisher_error", u[0], at[u])][u[1]][u[2]]
        - stats.metrics[cost_metric("fisher_error", v[0], at[v])][v[1]][v[2]]
        for u in flat
        for v in flat
        if u[0] == v[0] and at[v].bits == at[u].bits + 1
    )
    assert rises[1] == pytest.approx(every[0])
    assert rises[1] <= rises[2] <= rises[3]


def test_a_uniform_map_has_nothing_to_exchange(tiny_model: Make) -> None:
    opened = open_model(tiny_model("olmoe"))
    stats = drawn(opened, 0)
    made = allocate(stats, method="uniform", options=[OPTIONS[1]])
    found = refined(made, stats, "fisher_error", OPTIONS, judged_by(stats), 5)
    assert (found.taken, found.tried, found.precisions.experts) == (0, 0, made.experts)
