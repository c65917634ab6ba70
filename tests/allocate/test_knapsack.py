"""The knapsack against brute force, its promises about bytes, and its speed."""

from __future__ import annotations

import itertools
import os
import time
from typing import Any

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from mopeq.allocate import knapsack, predicted
from mopeq.allocate.knapsack import TOLERANCE, exact, greedy, knapsack_map, relaxation
from mopeq.errors import BudgetError, MapError
from mopeq.precision import FULL, GROUPS, Precision, PrecisionMap
from mopeq.stats import cost_table
from tables import OPTIONS, P2, P3, P4, measured, model


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """A few units with any losses, sizes with and without a common divisor, some options not allowed."""
    units, options = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    step = draw(st.sampled_from([1, 7, 64]))
    shape = (units, options)
    value = st.one_of(st.integers(0, 6).map(float), st.floats(-10, 1000).map(lambda v: round(v, 4)))
    loss = np.array(draw(st.lists(value, min_size=units * options, max_size=units * options))).reshape(shape)
    size = step * np.array(draw(st.lists(st.integers(1, 30), min_size=units * options, max_size=units * options)))
    size = size.reshape(shape).astype(np.int64)
    banned = np.array(draw(st.lists(st.booleans(), min_size=units * options, max_size=units * options))).reshape(shape)
    banned[np.arange(units), draw(st.integers(0, options - 1))] = False
    loss = np.where(banned, np.inf, loss)
    low = int(np.where(banned, 10**9, size).min(1).sum())
    high = int(np.where(banned, 0, size).max(1).sum())
    return loss, size, draw(st.integers(low, high + 2))


def brute(loss: np.ndarray, size: np.ndarray, budget: int) -> float:
    units = np.arange(len(loss))
    choices = (np.array(c) for c in itertools.product(range(loss.shape[1]), repeat=len(loss)))
    return min(float(loss[units, c].sum()) for c in choices if size[units, c].sum() <= budget)


def longest_step(loss: np.ndarray) -> float:
    finite = np.where(np.isfinite(loss), loss, np.nan)
    return float((np.nanmax(finite, 1) - np.nanmin(finite, 1)).max())


@settings(deadline=None, max_examples=200)
@given(problems())
def test_both_solvers_against_all_choices(problem: tuple[np.ndarray, np.ndarray, int]) -> None:
    loss, size, budget = problem
    best = brute(loss, size, budget)
    units = np.arange(len(loss))
    for solved in (greedy(loss, size, budget), exact(loss, size, budget)):
        assert solved.size == size[units, solved.choice].sum() <= budget
        assert solved.loss == pytest.approx(loss[units, solved.choice].sum())
        assert solved.bound <= best + 1e-9 * abs(best) + 1e-9
        assert best - 1e-9 <= solved.loss <= best + longest_step(loss) + 1e-9
    assert solved.solver == "exact"
    assert solved.loss <= best + TOLERANCE * abs(best) + 1e-9


@settings(deadline=None, max_examples=25)
@given(problems(), st.integers(0, 10**6))
def test_more_budget_is_never_worse(problem: tuple[np.ndarray, np.ndarray, int], more: int) -> None:
    loss, size, budget = problem
    less, same = exact(loss, size, budget), exact(loss, size, budget + more)
    assert same.loss <= less.loss + TOLERANCE * abs(less.loss) + 1e-9


@pytest.mark.parametrize("seed", range(6))
def test_larger_problems_meet_their_bound(seed: int) -> None:
    random = np.random.default_rng(seed)
    loss = random.lognormal(sigma=2, size=(60, 1)) * 4.0 ** -np.arange(4) * random.lognormal(sigma=0.3, size=(60, 4))
    size = (np.arange(1, 5) * random.integers(1, 4, size=(60, 1)) + random.integers(0, 2, size=(60, 4))).astype(
        np.int64
    )
    budget = int(size.min(1).sum() * (1.2 + 0.3 * seed))
    fast, slow = greedy(loss, size, budget), exact(loss, size, budget)
    assert slow.solver == "exact"
    assert slow.size <= budget
    assert slow.loss <= fast.loss
    by_bytes = np.full(budget + 1, np.inf)  # the classical dynamic programme over bytes
    by_bytes[0] = 0.0
    for row_loss, row_size in zip(loss, size, strict=True):
        after = np.full(budget + 1, np.inf)
        for value, extra in zip(row_loss, row_size, strict=True):
            after[extra:] = np.minimum(after[extra:], by_bytes[: budget + 1 - extra] + value)
        by_bytes = after
    best = float(by_bytes.min())
    assert best * (1 - 1e-12) <= slow.loss <= best * (1 + TOLERANCE)
    assert slow.bound <= best * (1 + 1e-12)


def test_a_dominated_option_is_never_taken() -> None:
    loss, size = np.array([[5.0, 9.0, 1.0], [5.0, 5.0, 4.0]]), np.array([[1, 2, 3], [1, 2, 9]])
    for budget, choice in ((2, [0, 0]), (4, [2, 0]), (11, [2, 0]), (12, [2, 2])):
        assert exact(loss, size, budget).choice.tolist() == choice
        assert greedy(loss, size, budget).choice.tolist() == choice


def test_every_multiplier_gives_a_bound() -> None:
    loss, size = np.array([[5.0, 1.0], [4.0, 3.0], [9.0, 0.5]]), np.array([[2, 4], [2, 3], [1, 4]])
    for budget in range(5, 12):
        best = brute(loss, size, budget)
        assert all(relaxation(loss, size, budget, m) <= best + 1e-12 for m in (0.0, 0.5, 1.0, 2.0, 3.0))
        assert greedy(loss, size, budget).bound <= best + 1e-12


def test_a_budget_below_the_cheapest_choice_is_refused() -> None:
    for solver in (greedy, exact):
        with pytest.raises(BudgetError, match="4 bytes for the experts; the options need at least 5"):
            solver(np.zeros((5, 2)), np.array([[1, 2]] * 5), 4)


def units_of(count: int, options: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray, int]:
    """Like a model of 128 experts a layer, gate_up twice the size of down."""
    random = np.random.default_rng(seed)
    bits = np.arange(2, 2 + options)
    loss = random.lognormal(sigma=2, size=(count, 1)) * 4.0**-bits * random.lognormal(sigma=0.2, size=(count, options))
    weights = 768 * 2048 * (1 + np.arange(count) % 2)
    size = (weights[:, None] * (bits + (16 + bits) / 64) / 8).astype(np.int64)
    return loss, size, int(0.6 * size.min(1).sum() + 0.4 * size.max(1).sum())


@pytest.mark.parametrize("seed", range(3))
def test_six_thousand_units_take_less_than_a_second(seed: int) -> None:
    problem = units_of(6144, seed=seed)
    for solver in (greedy, exact):
        start = time.process_time()
        solved = solver(*problem)
        assert time.process_time() - start < 1
    assert solved.solver == "exact"
    assert solved.loss - solved.bound <= TOLERANCE * solved.loss


def test_a_solver_that_is_stopped_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, size, budget = units_of(40)
    size = size + np.random.default_rng(1).integers(0, 1000, size=size.shape)
    monkeypatch.setattr(knapsack, "_core", lambda *_: (None, False))
    solved = exact(loss, size, budget, time_limit=0.25)
    assert "stopped after 0.25 s before the proof was complete" in solved.solver
    assert solved.size <= budget
    assert solved.loss <= greedy(loss, size, budget).loss
    assert solved.bound < solved.loss


def test_highs_is_used_and_its_noise_stays_off_stdout(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(0)
    loss, size = random.lognormal(size=(300, 4)), random.integers(1, 10**6, size=(300, 4))
    budget = int(0.7 * size.min(1).sum() + 0.3 * size.max(1).sum())
    milp = scipy.optimize.milp

    def noisy(*arguments: Any, **keywords: Any) -> Any:
        os.write(1, b"debugging\n")
        return milp(*arguments, **keywords)

    monkeypatch.setattr(scipy.optimize, "milp", noisy)
    assert exact(loss, size, budget).size <= budget
    os.write(1, b"still here\n")
    captured = capfd.readouterr()
    assert captured.out == "still here\n"
    assert "debugging" in captured.err


def test_greedy_spends_what_its_steps_leave() -> None:
    loss, size = np.array([[10.0, 0.0], [5.0, 0.0]]), np.array([[0, 10], [0, 6]])
    assert greedy(loss, size, 9).choice.tolist() == [0, 1]


def test_exchanges_alone_undo_a_greedy_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "_core", lambda *_: (None, False))
    loss, size = np.array([[8.0, 0.0], [10.5, 0.0]]), np.array([[0, 7], [0, 10]])
    assert greedy(loss, size, 10).choice.tolist() == [1, 0]
    assert exact(loss, size, 10).choice.tolist() == [0, 1]


def test_options_on_one_line_up_to_rounding_keep_to_the_budget() -> None:
    random = np.random.default_rng(0)
    for _ in range(2500):
        size = random.integers(1, 9, size=(1, 4)).cumsum(1)
        loss = 1 + random.random() - random.random() * size / 7
        for budget in size[0].tolist():
            assert greedy(loss, size, budget).size <= budget


@pytest.mark.parametrize("granularity", ["group", "expert"])
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("bits", [2.5625, 2.7, 3.0, 3.3, 4.4, 16])
def test_maps_keep_to_budgets_in_bits(bits: float, uneven: bool, granularity: str) -> None:
    stats = measured(model(uneven=uneven))
    losses = []
    for exactly in (True, False):
        made = knapsack_map(stats, "fisher_error", bits, granularity=granularity, exactly=exactly)
        assert stats.model.expert_bits(made) <= bits
        assert stats.model.expert_bits(made) >= min(bits, 4.625) - 0.15
        if granularity == "expert":
            assert made.experts["gate_up"] == made.experts["down"]
        table = cost_table(stats, "fisher_error")
        losses.append(sum(table.loss[i, table.options.index(made.of(u.layer, u.expert, u.group or "down"))]
                          for i, u in enumerate(table.units)))  # fmt: skip
        assert PrecisionMap.from_json(made.to_json()) == made
    assert losses[0] <= losses[1]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.floats(0.0, 1.1), st.sampled_from([{}, {"attention": P4, "lm_head": FULL}]))
def test_maps_keep_to_budgets_in_bytes(seed: int, share: float, rest: dict[str, Precision]) -> None:
    stats = measured(model(layers=2, experts=4, uneven=True), seed=seed)
    ends = [stats.model.total_bytes(PrecisionMap.uniform(stats.model.experts, p, rest)) for p in (P2, P4)]
    budget = int(ends[0] + share * (ends[1] - ends[0]))
    made = knapsack_map(stats, "fisher_error", f"{budget}B", rest=rest)
    assert made.rest == rest
    assert stats.model.total_bytes(made) <= budget


def test_the_rest_is_paid_from_the_same_bytes() -> None:
    stats = measured()
    budget = stats.model.total_bytes(PrecisionMap.uniform(stats.model.experts, P3, {"lm_head": FULL}))
    dear = knapsack_map(stats, "fisher_error", f"{budget}B", rest={"lm_head": FULL})
    cheap = knapsack_map(stats, "fisher_error", f"{budget}B", rest={"lm_head": P2, "attention": P2})
    assert stats.model.expert_bytes(cheap) > stats.model.expert_bytes(dear)


def test_floors_and_ceilings() -> None:
    stats = measured()
    made = knapsack_map(stats, "fisher_error", 3.7, floors={0: 3, 1: P4}, ceilings={2: P3, 0: 3})
    bits = {k: {p.bits for g in GROUPS for p in made.experts[g][k]} for k in made.layers}
    assert bits[0] == {3}
    assert bits[1] == {4}
    assert bits[2] == {2, 3}
    assert stats.model.expert_bits(made) <= 3.7
    assert made.note["floors"] == {"0": 3, "1": 4}
    assert made.note["ceilings"] == {"0": 3, "2": 3}


def test_floors_raise_the_smallest_budget() -> None:
    stats = measured()
    with pytest.raises(BudgetError, match=r"budget 2.6bpw is below the smallest map that the options allow, 2.907bpw"):
        knapsack_map(stats, "fisher_error", 2.6, floors={1: 3})


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"floors": {0: 5}}, r"no option is left for layers \[0\]: the options are 2g32, 3g32, 4g32"),
        ({"floors": {1: 4}, "ceilings": {1: 3}}, r"no option is left for layers \[1\]"),
    ],
)
def test_bounds_that_leave_nothing(bounds: dict[str, dict[int, int]], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        knapsack_map(measured(), "fisher_error", 3.0, **bounds)  # type: ignore[arg-type]


def test_bounds_of_layers_without_experts() -> None:
    with pytest.raises(MapError, match=r"bounds for layers \[7\], which have no experts; layers are 0 to 2"):
        knapsack_map(measured(), "fisher_error", 3.0, floors={7: 3})


@pytest.mark.parametrize("budget", ["2.5bpw", "1KB", "17bpw", "1GB"])
def test_budgets_out_of_reach(budget: str) -> None:
    with pytest.raises(BudgetError, match=r"below the smallest map|above 16 bits"):
        knapsack_map(measured(), "fisher_error", budget)


def test_costs_that_were_not_measured() -> None:
    with pytest.raises(MapError, match="cost 'output_error' was not measured"):
        knapsack_map(measured(), "output_error", 3.0)
    with pytest.raises(MapError, match="was not measured at 5g32"):
        knapsack_map(measured(), "fisher_error", 3.0, [P2, Precision(5, 32)])


def test_chosen_options_and_the_note() -> None:
    stats = measured()
    made = knapsack_map(stats, "fisher_error", "3.0", [P4, P2])
    assert set(made.histogram()) == {P2, P4}
    assert made.note["method"] == "knapsack"
    assert made.note["budget"] == "3.0bpw"
    assert made.note["options"] == ["2g32", "4g32"]
    assert made.note["solver"] == "exact"
    assert made.note["lower_bound"] > 0


def test_a_measured_cost_that_rises_with_bits_is_not_paid_for() -> None:
    stats = measured()
    name = "fisher_error/down/4g32"
    rows = {k: tuple(10 * v for v in stats.metrics["fisher_error/down/3g32"][k]) for k in stats.model.experts}
    made = knapsack_map(stats.with_metrics({name: rows}), "fisher_error", 4.6)
    assert all(p != P4 for row in made.experts["down"].values() for p in row)
    assert OPTIONS[-1] in made.histogram()


@pytest.mark.parametrize("granularity", ["group", "expert"])
def test_uniform_layers_is_the_best_of_all_such_maps(granularity: str) -> None:
    stats = measured(model(layers=2, experts=4, uneven=True))
    budget = "3.1bpw"
    made = knapsack_map(stats, "fisher_error", budget, granularity=granularity, uniform_layers=True, rest={})
    assert all(len(set(row)) == 1 for rows in made.experts.values() for row in rows.values())
    best = np.inf
    choosers = [(layer, group) for layer in stats.model.layers for group in GROUPS]
    for choice in itertools.product(OPTIONS, repeat=len(choosers)):
        chosen = dict(zip(choosers, choice, strict=True))
        if granularity == "expert" and any(chosen[k, "gate_up"] != chosen[k, "down"] for k in stats.model.layers):
            continue
        rows = {g: {k: (chosen[k, g],) * n for k, n in stats.model.experts.items()} for g in GROUPS}
        other = PrecisionMap(rows, {})
        if stats.model.expert_bits(other) <= 3.1:
            best = min(best, predicted(stats, "fisher_error", other))
    assert predicted(stats, "fisher_error", made) == pytest.approx(best, rel=1e-9)
    assert stats.model.expert_bits(made) <= 3.1
    assert made.note["uniform_layers"] is True
    assert best > predicted(stats, "fisher_error", knapsack_map(stats, "fisher_error", budget, rest={}))
