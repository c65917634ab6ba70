"""The one function in front of the methods, its notes, and scores."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from mopeq.allocate import METHODS, allocate, predicted, scored
from mopeq.allocate.scores import normalized
from mopeq.errors import BudgetError, MapError
from mopeq.precision import DEFAULT_REST, FULL, GROUPS, Precision, PrecisionMap
from mopeq.stats import Stats, cost_metric
from tables import OPTIONS, P2, P3, P4, measured, model

KEYWORDS: dict[str, dict[str, Any]] = {
    "knapsack": {"budget": "3.0bpw"},
    "kmeans": {"options": OPTIONS},
    "uniform": {"options": [P3]},
    "random": {"budget": "3.0bpw", "options": OPTIONS, "seed": 3},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_says_what_it_made(method: str) -> None:
    stats = measured()
    made = allocate(stats, method=method, **KEYWORDS[method])
    note = made.note
    assert note["method"] == method
    assert note["expert_bits"] == pytest.approx(stats.model.expert_bits(made), abs=1e-6)
    assert note["expert_bytes"] == stats.model.expert_bytes(made)
    assert note["checkpoint_bytes"] == stats.model.total_bytes(made)
    assert note["cost"] == "fisher_error"
    assert note["predicted_loss"] == predicted(stats, "fisher_error", made)
    assert made.rest == DEFAULT_REST
    assert PrecisionMap.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_knapsack_predicts_less_than_every_control() -> None:
    stats = measured()
    loss = {m: allocate(stats, method=m, budget="3.6bpw", options=OPTIONS).note["predicted_loss"] for m in
            ("knapsack", "uniform", "random")}  # fmt: skip
    assert loss["knapsack"] < loss["random"]
    assert loss["knapsack"] < loss["uniform"]


def test_the_predicted_loss_is_the_sum_over_units() -> None:
    stats = measured(model(layers=2, experts=2))
    rows: Any = {"gate_up": {0: (P2, P3), 1: (P4, P4)}, "down": {0: (P4, P2), 1: (P3, P2)}}
    expected = sum(
        stats.metrics[cost_metric("fisher_error", g, p)][k][e] for g in GROUPS for k in rows[g] for e, p in
        enumerate(rows[g][k])
    )  # fmt: skip
    assert predicted(stats, "fisher_error", PrecisionMap(rows)) == pytest.approx(expected, rel=1e-12)


def test_a_loss_cannot_be_predicted_at_precisions_not_measured() -> None:
    stats = measured()
    made = allocate(stats, method="uniform", options=[FULL])
    assert "predicted_loss" not in made.note
    with pytest.raises(MapError, match="cost 'fisher_error' was not measured at 16; it was at: 2g32, 3g32, 4g32"):
        predicted(stats, "fisher_error", made)
    with pytest.raises(MapError, match="it was at: no precision"):
        predicted(stats, "other", allocate(stats, method="uniform", options=[P2]))


def test_the_gradient_weighted_cost_is_preferred() -> None:
    both = measured().with_metrics(measured(cost="output_error", seed=9).metrics)
    assert allocate(both, budget=3.0).note["cost"] == "fisher_error"
    assert allocate(both, budget=3.0, cost="output_error").note["cost"] == "output_error"
    assert allocate(measured(cost="output_error"), budget=3.0).note["cost"] == "output_error"


def test_greedy_is_available() -> None:
    assert allocate(measured(), budget=3.0, exact=False).note["solver"] == "greedy"


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"method": "best"}, MapError, "method 'best'; expected knapsack, kmeans, uniform, random"),
        ({"method": "knapsack"}, BudgetError, "knapsack needs a budget, found none"),
        ({"method": "random"}, BudgetError, "random needs a budget, found none"),
        ({"method": "kmeans", "budget": "3bpw"}, BudgetError, "k-means decides the size itself and cannot keep"),
        ({"method": "kmeans", "floors": {0: 3}}, MapError, "floors and ceilings do not apply to kmeans"),
        ({"method": "kmeans", "score": "fisher", "options": OPTIONS}, MapError, "no metric 'fisher'"),
        ({"budget": "3bpw", "cost": "other"}, MapError, "cost 'other' was not measured"),
        ({"budget": "much"}, BudgetError, "budget 'much'; expected"),
        ({"method": "uniform"}, MapError, "0 options for a uniform map without a budget"),
    ],
)
def test_what_cannot_be_allocated(keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        allocate(measured(), **keywords)


def test_a_knapsack_needs_a_cost() -> None:
    stats = Stats(model(), {"frequency": dict.fromkeys(range(3), (1.0,) * 8)})
    with pytest.raises(
        MapError, match="no cost was measured, so knapsack has nothing to minimize; measure fisher_error"
    ):
        allocate(stats, budget=3.0)
    assert "predicted_loss" not in allocate(stats, method="uniform", options=[P3]).note


def test_floors_reach_the_knapsack() -> None:
    made = allocate(measured(), budget=3.4, floors={1: 4})
    assert {p.bits for g in GROUPS for p in made.experts[g][1]} == {4}


def test_kmeans_by_score_and_scope() -> None:
    stats = measured()
    made = allocate(stats, method="kmeans", score="frequency*inverse_norm", scope="model", options=OPTIONS)
    assert made.note["score"] == "frequency*inverse_norm"
    assert made.note["scope"] == "model"
    other = allocate(stats, method="kmeans", options=OPTIONS)
    assert other.note["score"] == "inverse_norm"
    assert other.experts != made.experts


def stats_of(**metrics: Any) -> Stats:
    return Stats(model(layers=2, experts=2), metrics)


def test_one_metric_is_a_score_as_measured() -> None:
    rows = {0: (1.0, 3.0), 1: (10.0, 0.0)}
    assert scored(stats_of(fisher=rows), "fisher") == rows


def test_a_product_is_of_shares_within_the_layer() -> None:
    stats = stats_of(frequency={0: (1.0, 3.0), 1: (0.0, 0.0)}, fisher={0: (2.0, 2.0), 1: (30.0, 10.0)})
    assert scored(stats, "frequency * fisher") == {0: (0.125, 0.375), 1: (0.375, 0.125)}
    assert scored(stats, "frequency*frequency")[0] == (0.0625, 0.5625)


def test_normalized_keeps_signs_and_knows_zeros() -> None:
    assert normalized({0: (-1.0, 3.0), 1: (0.0, 0.0)}) == {0: (-0.25, 0.75), 1: (0.5, 0.5)}


@pytest.mark.parametrize("expression", ["", "fisher*", "*", "fisher**fisher"])
def test_expressions_that_are_not_scores(expression: str) -> None:
    with pytest.raises(MapError, match="expected a metric, or metrics joined by"):
        scored(stats_of(fisher={0: (1.0, 3.0), 1: (1.0, 0.0)}), expression)


def test_unknown_factors() -> None:
    with pytest.raises(MapError, match="no metric 'hessian'"):
        scored(stats_of(fisher={0: (1.0, 3.0), 1: (1.0, 0.0)}), "fisher*hessian")


def test_no_tensor_library_is_loaded() -> None:
    code = "import sys, mopeq.allocate; print(sorted({'torch', 'transformers', 'scipy.optimize'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_options_default_to_two_three_and_four_bits_in_the_largest_groups_that_fit() -> None:
    stats = measured(options=[Precision(b, 64) for b in (2, 3, 4)])
    made = allocate(stats, method="uniform", budget=3.5)
    assert made.histogram() == {Precision(3, 64): 48}
