"""Allocation: from measured statistics to a precision for every unit. Numbers only; no tensor library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mopeq.allocate.baselines import interpolated_map, inverted_map, random_map, ranked_map, uniform_map
from mopeq.allocate.budget import Budget, expert_budget, parse_budget
from mopeq.allocate.kmeans import kmeans_map
from mopeq.allocate.knapsack import knapsack_map
from mopeq.allocate.protect import super_experts
from mopeq.allocate.scores import score as scored
from mopeq.errors import BudgetError, MapError
from mopeq.precision import DEFAULT_REST, GROUPS, Precision, PrecisionMap
from mopeq.stats import Stats, cost_metric, cost_options

__all__ = [
    "COSTS",
    "METHODS",
    "Budget",
    "allocate",
    "expert_budget",
    "interpolated_map",
    "inverted_map",
    "kmeans_map",
    "knapsack_map",
    "parse_budget",
    "predicted",
    "random_map",
    "ranked_map",
    "scored",
    "super_experts",
    "uniform_map",
]

METHODS = ("knapsack", "kmeans", "uniform", "random")
COSTS = ("fisher_error", "output_error")
"""Cost metrics in the order in which they are preferred where none is named."""
LEVELS = (2, 3, 4)
"""The bits of MoPEQ, for methods that need no measured cost."""


def allocate(
    stats: Stats,
    *,
    method: str = "knapsack",
    budget: str | float | Budget | None = None,
    options: Sequence[Precision] | None = None,
    cost: str | None = None,
    score: str = "inverse_norm",
    scope: str = "layer",
    granularity: str = "group",
    uniform_layers: bool = False,
    rest: Mapping[str, Precision] | None = None,
    floors: Mapping[int, Precision | int] | None = None,
    ceilings: Mapping[int, Precision | int] | None = None,
    protect: bool = True,
    exact: bool = True,
    seed: int = 0,
) -> PrecisionMap:
    """A precision map for the model these statistics were measured on.

    method: ``knapsack`` least predicted loss within ``budget``, over ``options`` (default: all measured) of ``cost``;
    ``kmeans`` clusters of ``score`` within ``scope`` (``layer`` or ``model``), one per option, no budget;
    ``uniform`` the one option, or the largest within ``budget``; ``random`` a random set of units between two options.
    rest: precisions outside the routed experts, priced first where the budget is in bytes. The others: see
    :func:`knapsack_map`.

    The map's ``note`` says how it was made: method, budget, ``checkpoint_bytes``, ``expert_bits`` (per weight, scales
    and zero points counted), and ``predicted_loss`` where the cost was measured at every precision used. Raises
    :class:`BudgetError` and :class:`MapError`.
    """
    rest = DEFAULT_REST if rest is None else rest
    mopeq_levels = stats.model.precisions(LEVELS)
    if budget is None and method in ("knapsack", "random"):
        raise BudgetError(f"{method} needs a budget, found none; give one such as 3.0bpw or 1.4GB")
    if method != "knapsack" and (floors or ceilings):
        raise MapError(f"floors and ceilings do not apply to {method}; use knapsack, or leave them out")
    if uniform_layers and method not in ("knapsack", "uniform"):
        raise MapError(f"{method} does not choose by layers; use knapsack, or leave out uniform layers")
    if method == "knapsack":
        assert budget is not None
        made = knapsack_map(stats, _cost(stats, cost), budget, options, granularity=granularity,
                            uniform_layers=uniform_layers, rest=rest, floors=floors, ceilings=ceilings,
                            protect=protect, exactly=exact)  # fmt: skip
    elif method == "kmeans":
        if budget is not None:
            raise BudgetError(
                f"k-means decides the size itself and cannot keep the budget {budget}; use knapsack, or leave it out"
            )
        levels = options or mopeq_levels
        note = {"method": "kmeans", "score": score, "scope": scope, "options": [str(p) for p in sorted(set(levels))]}
        made = kmeans_map(stats.model, scored(stats, score), levels, scope=scope, rest=rest, note=note)
    elif method == "uniform":
        made = uniform_map(stats.model, options or (mopeq_levels if budget is not None else ()), budget, rest)
    elif method == "random":
        assert budget is not None
        made = interpolated_map(
            stats.model, options or mopeq_levels, budget, granularity=granularity, seed=seed, rest=rest
        )
    else:
        raise MapError(f"method {method!r}; expected {', '.join(METHODS)}")
    return described(stats, made, cost)


def described(stats: Stats, precisions: PrecisionMap, cost: str | None = None) -> PrecisionMap:
    """The map with its size, and its predicted loss where the cost was measured, added to its note."""
    model = stats.model
    note: dict[str, Any] = dict(precisions.note)
    note["expert_bits"] = round(model.expert_bits(precisions), 6)
    note["expert_bytes"] = model.expert_bytes(precisions)
    note["checkpoint_bytes"] = model.total_bytes(precisions)
    name = cost or note.get("cost") or next((c for c in COSTS if cost_options(stats, c)), None)
    if name is not None and set(precisions.histogram()) <= set(cost_options(stats, name)):
        note["cost"] = name
        note["predicted_loss"] = predicted(stats, name, precisions)
    return replace(precisions, note=note)


def predicted(stats: Stats, cost: str, precisions: PrecisionMap) -> float:
    """Summed cost of a map's units.

    Raises :class:`MapError` where ``cost`` was not measured at one of its precisions.
    """
    stats.model.check(precisions)
    missing = sorted(set(precisions.histogram()) - set(cost_options(stats, cost)))
    if missing:
        known = ", ".join(map(str, cost_options(stats, cost))) or "no precision"
        raise MapError(f"cost {cost!r} was not measured at {', '.join(map(str, missing))}; it was at: {known}")
    total = 0.0
    for group in GROUPS:
        for layer, row in precisions.experts[group].items():
            columns = {p: stats.metrics[cost_metric(cost, group, p)][layer] for p in set(row)}
            total += sum(columns[p][e] for e, p in enumerate(row))
    return total


def _cost(stats: Stats, asked: str | None) -> str:
    found = asked or next((c for c in COSTS if cost_options(stats, c)), None)
    if found is None:
        raise MapError(
            f"no cost was measured, so knapsack has nothing to minimize; measure {' or '.join(COSTS)} (mopeq analyze)"
        )
    return found
