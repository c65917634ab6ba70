"""0 bits among the options: whole experts, never too many of a layer, the best such map."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from mopeq.allocate import allocate
from mopeq.allocate.budget import least_bytes
from mopeq.allocate.protect import PEAK
from mopeq.errors import BudgetError, MapError
from mopeq.precision import FULL, GROUPS, LEFT_OUT, PrecisionMap, parse_precision
from mopeq.spec import Inventory
from mopeq.stats import Stats, cost_metric
from tables import P2, P3, measured, model

OPTIONS = (LEFT_OUT, P2, P3)


def with_left_out(inventory: Inventory, seed: int = 0, least: float = 0.0) -> Stats:
    """Costs as they are drawn for 2 and 3 bits; leaving an expert out costs a drawn multiple of its cost at 2."""
    stats = measured(inventory, (P2, P3), seed)
    draw = np.random.default_rng(seed + 1000)
    lost = {k: draw.lognormal(0.5, 1.5, n) for k, n in inventory.experts.items()}
    whole = {
        k: least + sum(np.array(stats.metrics[cost_metric("fisher_error", g, P2)][k]) for g in GROUPS) * lost[k]
        for k in lost
    }
    names = [cost_metric("fisher_error", g, LEFT_OUT) for g in GROUPS]
    return stats.with_metrics({names[0]: whole, names[1]: {k: [0.0] * n for k, n in inventory.experts.items()}})


def loss(stats: Stats, made: PrecisionMap) -> float:
    return sum(
        stats.metrics[cost_metric("fisher_error", g, p)][layer][e]
        for g in GROUPS
        for layer, row in made.experts[g].items()
        for e, p in enumerate(row)
    )


@pytest.mark.parametrize("granularity", ["group", "expert"])
@pytest.mark.parametrize("bits", [1.8, 2.6, 3.2])
def test_the_map_is_the_best_of_all(granularity: str, bits: float) -> None:
    inventory = model(1, 5)
    pairs = [(LEFT_OUT, LEFT_OUT), *product((P2, P3), repeat=2)]
    pairs = [(a, b) for a, b in pairs if granularity == "group" or a == b]
    for seed in range(6):
        stats = with_left_out(inventory, seed)
        made = allocate(stats, budget=f"{bits}bpw", options=OPTIONS, granularity=granularity)
        at_zero = stats.metrics[cost_metric("fisher_error", "gate_up", LEFT_OUT)][0]
        needed = sorted(range(5), key=lambda e, row=at_zero: -row[e])[:2]  # type: ignore[misc]
        best = np.inf
        for rows in product(pairs, repeat=5):
            if any(rows[e][0] == LEFT_OUT for e in needed):
                continue
            other = PrecisionMap({g: {0: tuple(pair[i] for pair in rows)} for i, g in enumerate(GROUPS)}, made.rest)
            if inventory.expert_bits(other) <= bits + 1e-9:
                best = min(best, loss(stats, other))
        assert loss(stats, made) == pytest.approx(best, rel=1e-5)
        assert made.note["predicted_loss"] == pytest.approx(loss(stats, made))


def test_layers_keep_the_experts_that_a_token_needs() -> None:
    stats = with_left_out(model(3, 8), seed=1)
    free = {k: [0.0] * n for k, n in stats.model.experts.items()}
    stats = stats.with_metrics({cost_metric("fisher_error", "gate_up", LEFT_OUT): free})
    smallest = least_bytes(stats.model, OPTIONS)
    made = allocate(stats, budget=f"{8 * smallest / stats.model.expert_parameters}bpw", options=OPTIONS)
    for row in made.experts["down"].values():
        assert sum(p != LEFT_OUT for p in row) == 2
    assert stats.model.expert_bytes(made) == smallest
    with pytest.raises(BudgetError, match="below the smallest map"):
        allocate(stats, budget="0.2bpw", options=OPTIONS)
    with pytest.raises(MapError, match="only precision to choose from"):
        least_bytes(stats.model, [LEFT_OUT])


def test_nobody_is_left_out_for_nothing() -> None:
    """Leaving out costs more than 3 bits save, layers choose together, or the expert is a super-expert."""
    dear = with_left_out(model(2, 8), least=1e3)
    assert LEFT_OUT not in allocate(dear, budget="2.8bpw", options=OPTIONS).histogram()
    stats = with_left_out(model(4, 64))
    assert LEFT_OUT in allocate(stats, budget="2.8bpw", options=OPTIONS).histogram()
    assert LEFT_OUT not in allocate(stats, budget="2.8bpw", options=OPTIONS, uniform_layers=True).histogram()
    gone = next(
        e for e, p in enumerate(allocate(stats, budget="2.8bpw", options=OPTIONS).experts["down"][2]) if not p.bits
    )
    peaks = {k: np.ones(n) for k, n in stats.model.experts.items()}
    peaks[2][gone] = 1000
    kept = allocate(stats.with_metrics({PEAK: peaks}), budget="2.8bpw", options=OPTIONS)
    assert [kept.of(2, gone, g) for g in GROUPS] == [P3, P3]


def test_it_is_written_as_0_and_costs_nothing() -> None:
    assert str(LEFT_OUT) == "0"
    assert parse_precision("0") == parse_precision(0) == LEFT_OUT < P2 < FULL
    assert LEFT_OUT.nbytes(64, 64) == 0
    made = allocate(with_left_out(model(2, 8)), budget="2.4bpw", options=OPTIONS)
    again = PrecisionMap.from_json(made.to_json())
    assert again.experts == made.experts
    assert 0 in again.to_json()["experts"]["down"]["0"] + again.to_json()["experts"]["down"]["1"]
