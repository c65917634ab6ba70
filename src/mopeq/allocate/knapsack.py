"""The multiple-choice knapsack in bytes: one option per unit, least summed loss, never above a number of bytes.

Two solvers. :func:`greedy` takes the steps of every unit's lower convex hull in the order of loss saved per byte,
which is the optimum of the linear relaxation up to one step (Sinha and Zoltners 1979), and fills what is left.
:func:`exact` uses the relaxation's multiplier to discard every option that no better solution can contain, and gives
the few units that remain to HiGHS. Options that are not allowed have infinite loss.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mopeq.allocate.budget import Budget, check_budget, parse_budget
from mopeq.allocate.protect import super_experts
from mopeq.errors import BudgetError, MapError
from mopeq.precision import DEFAULT_REST, GROUPS, LEFT_OUT, Precision, PrecisionMap
from mopeq.stats import CostTable, Stats, cost_table

__all__ = ["Solution", "exact", "greedy", "knapsack_map", "relaxation"]

TOLERANCE = 1e-6
"""Relative distance to the proven least loss at which :func:`exact` stops."""
EXCHANGES = 100
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Solution:
    """choice: option of each unit (units,); loss: their sum; size: their bytes; bound: no solution has less loss."""

    choice: Ints
    loss: float
    size: int
    bound: float
    solver: str


def greedy(loss: Floats, size: Ints, budget: int) -> Solution:
    """Convex-hull greedy. loss, size: (units, options); loss infinite where an option is not allowed.

    At most one hull step's loss above the optimum. Raises :class:`BudgetError` if the cheapest choice exceeds
    ``budget``.
    """
    choice, bound, _ = _hull_greedy(loss, size, budget)
    _fill(choice, loss, size, budget)
    return _solution(choice, loss, size, bound, "greedy")


def exact(loss: Floats, size: Ints, budget: int, time_limit: float = 5.0) -> Solution:
    """A choice whose loss is proven to be within ``TOLERANCE`` (relative) of the least.

    The greedy choice is improved by exchanges of pairs. Unless it then meets the relaxation's bound, options that no
    better solution can contain are dropped: those whose reduced loss at the relaxation's multiplier exceeds the
    distance to the bound. HiGHS solves what remains. If it does not finish within ``time_limit`` seconds, the best
    choice so far is returned and ``solver`` says so. Raises :class:`BudgetError` if the cheapest choice exceeds
    ``budget``.
    """
    choice, bound, multiplier = _hull_greedy(loss, size, budget)
    _fill(choice, loss, size, budget)
    _exchange(choice, loss, size, budget)
    start = _solution(choice, loss, size, bound, "exact")
    gap = start.loss - bound
    rounding = 1e-14 * float(np.abs(loss[np.isfinite(loss)]).sum())
    if gap <= TOLERANCE * abs(start.loss) + rounding:
        return start
    reduced = loss + multiplier * size
    reduced -= reduced.min(1, keepdims=True)
    keep = reduced <= gap + rounding
    choice = reduced.argmin(1)
    free = np.flatnonzero(keep.sum(1) > 1)
    held = np.ones(len(loss), dtype=bool)
    held[free] = False
    loss_held, size_held = float(_at(loss, choice)[held].sum()), int(_at(size, choice)[held].sum())
    found, finished = _core(keep[free], loss[free], size[free], budget - size_held, loss_held, gap, time_limit)
    best = start
    if found is not None:
        choice[free] = found
        other = _solution(choice, loss, size, bound, "exact")
        best = other if other.size <= budget and other.loss < start.loss else start
    if finished:
        return replace(best, bound=max(best.bound, best.loss - TOLERANCE * abs(best.loss)))
    return replace(
        best, solver=f"greedy, exchanges and HiGHS, stopped after {time_limit:g} s before the proof was complete"
    )


def relaxation(loss: Floats, size: Ints, budget: int, multiplier: float) -> float:
    """Lagrangian bound: every choice within ``budget`` has a loss of at least this, for every multiplier m >= 0.

    ``sum over units of min over options of (loss + m size), less m budget``.
    """
    return float((loss + multiplier * size).min(1).sum() - multiplier * budget)


def knapsack_map(
    stats: Stats,
    cost: str,
    budget: str | float | Budget,
    options: Sequence[Precision] | None = None,
    *,
    granularity: str = "group",
    uniform_layers: bool = False,
    rest: Mapping[str, Precision] | None = None,
    floors: Mapping[int, Precision | int] | None = None,
    ceilings: Mapping[int, Precision | int] | None = None,
    protect: bool = True,
    exactly: bool = True,
    time_limit: float = 5.0,
) -> PrecisionMap:
    """The map of least predicted loss within a budget.

    ``cost`` names a measured cost, ``options`` (default: all measured) the precisions to choose from, ``granularity``
    whether gate_up and down of an expert choose apart (``group``) or together (``expert``). With ``uniform_layers`` all
    experts of a layer choose together, as runtimes need that know one precision a layer. ``floors`` and
    ``ceilings`` bound the bits of single layers; ``protect`` gives super-experts the most bits among the options (not
    with ``uniform_layers``, where it would give them to their whole layer). ``exactly`` chooses the solver. Raises
    :class:`BudgetError` for a budget outside what the options can reach, :class:`MapError` for costs, layers or bounds
    that do not exist.
    """
    rest = DEFAULT_REST if rest is None else rest
    asked = parse_budget(budget)
    table = cost_table(stats, cost, options, granularity)
    loss, size = np.where(_allowed(table, floors or {}, ceilings or {}), table.loss, np.inf), table.size
    held = super_experts(stats) if protect and not uniform_layers else {}
    loss = np.where(_below_best(table, loss, held), np.inf, loss)
    loss = np.where(_needed(table, stats, uniform_layers), np.inf, loss)
    chooser = np.arange(len(table.units))
    pairs: Ints | None = None
    if uniform_layers:
        loss, size, chooser = _merged(table, loss)
    elif granularity == "group" and any(p == LEFT_OUT for p in table.options):
        loss, size, chooser, pairs = _whole(table, loss)
    cheapest = int(np.where(np.isfinite(loss), size, np.iinfo(np.int64).max).min(1).sum())
    available = check_budget(asked, stats.model, rest, cheapest)
    solved = exact(loss, size, available, time_limit) if exactly else greedy(loss, size, available)
    note: dict[str, Any] = {"method": "knapsack", "cost": cost, "granularity": granularity, "budget": str(asked)}
    note |= {"uniform_layers": True} if uniform_layers else {}
    note |= {"super_experts": list(held)} if held else {}
    note |= {"options": [str(p) for p in table.options], "solver": solved.solver, "lower_bound": solved.bound}
    note |= {name: {str(k): _bits(v) for k, v in sorted(b.items())} for name, b in
             (("floors", floors), ("ceilings", ceilings)) if b}  # fmt: skip
    choice = solved.choice[chooser]
    if pairs is not None:
        choice = pairs[choice, [GROUPS.index(unit.group or GROUPS[0]) for unit in table.units]]
    made = table.to_map(choice, rest, note)
    stats.model.check(made)
    return made


def _below_best(table: CostTable, loss: Floats, held: Collection[str]) -> NDArray[np.bool_]:
    """Options (units, options) of the experts named that have fewer bits than the best which their layer allows."""
    bits = np.array([p.bits for p in table.options])
    named = np.array([f"{unit.layer}.{unit.expert}" in held for unit in table.units])
    best = np.where(np.isfinite(loss), bits, 0).max(1)
    below: NDArray[np.bool_] = named[:, None] & (bits < best[:, None])
    return below


def _needed(table: CostTable, stats: Stats, uniform_layers: bool) -> NDArray[np.bool_]:
    """Options (units, options) of 0 bits that are none: of as many experts of a layer as a token chooses, the dearest.

    With ``uniform_layers`` of all.
    """
    needed = np.zeros(table.loss.shape, dtype=bool)
    if LEFT_OUT not in table.options:
        return needed
    column = table.options.index(LEFT_OUT)
    lost: dict[int, dict[int, float]] = {}
    for unit, loss in zip(table.units, table.loss[:, column], strict=True):
        row = lost.setdefault(unit.layer, {})
        row[unit.expert] = row.get(unit.expert, 0.0) + float(loss)
    kept = {
        (layer, expert)
        for layer, row in lost.items()
        for expert in sorted(row, key=lambda e, row=row: -row[e])[: stats.model.layers[layer].top_k]  # type: ignore[misc]
    }
    needed[:, column] = [uniform_layers or (unit.layer, unit.expert) in kept for unit in table.units]
    return needed


def _whole(table: CostTable, loss: Floats) -> tuple[Floats, Ints, Ints, Ints]:
    """Experts choose for both groups, because they are left out with both: loss and size (experts, pairs of options).

    Then each unit's expert (units,), and the options of both groups in each pair (pairs, 2).
    """
    none = table.options.index(LEFT_OUT)
    pairs = [(a, b) for a in range(len(table.options)) for b in range(len(table.options)) if (a == none) == (b == none)]
    numbers: dict[tuple[int, int], int] = {}
    chooser = np.array([numbers.setdefault((unit.layer, unit.expert), len(numbers)) for unit in table.units])
    both, size = np.zeros((len(numbers), len(pairs))), np.zeros((len(numbers), len(pairs)), dtype=np.int64)
    for at, unit in enumerate(table.units):
        columns = [pair[GROUPS.index(unit.group or GROUPS[0])] for pair in pairs]
        both[chooser[at]] += loss[at, columns]
        size[chooser[at]] += table.size[at, columns]
    return both, size, chooser, np.array(pairs)


def _merged(table: CostTable, loss: Floats) -> tuple[Floats, Ints, Ints]:
    """Loss and size (choosers, options) where a layer's units of one group choose together; each unit's chooser."""
    numbers: dict[tuple[int, str | None], int] = {}
    chooser = np.array([numbers.setdefault((unit.layer, unit.group), len(numbers)) for unit in table.units])
    merged, size = np.zeros((len(numbers), loss.shape[1])), np.zeros((len(numbers), loss.shape[1]), dtype=np.int64)
    np.add.at(merged, chooser, loss)
    np.add.at(size, chooser, table.size)
    return merged, size, chooser


def _bits(bound: Precision | int) -> int:
    return bound.bits if isinstance(bound, Precision) else int(bound)


def _allowed(
    table: CostTable, floors: Mapping[int, Precision | int], ceilings: Mapping[int, Precision | int]
) -> NDArray[np.bool_]:
    """Options (units, options) within the bounds of their layers."""
    bits = np.array([p.bits for p in table.options])
    known = sorted({u.layer for u in table.units})
    layer = np.array([u.layer for u in table.units])
    allowed = np.ones(table.loss.shape, dtype=bool)
    unknown = sorted((set(floors) | set(ceilings)) - set(known))
    if unknown:
        raise MapError(f"bounds for layers {unknown}, which have no experts; layers are {known[0]} to {known[-1]}")
    for index, floor in floors.items():
        allowed[layer == index] &= bits >= _bits(floor)
    for index, ceiling in ceilings.items():
        allowed[layer == index] &= bits <= _bits(ceiling)
    empty = [k for k in known if not allowed[layer == k].any(1).all()]
    if empty:
        raise BudgetError(
            f"no option is left for layers {empty}: the options are {', '.join(map(str, table.options))}; "
            "widen the floors and ceilings, or add options"
        )
    return allowed


def _at(values: NDArray[Any], choice: Ints) -> NDArray[Any]:
    return values[np.arange(len(choice)), choice]


def _solution(choice: Ints, loss: Floats, size: Ints, bound: float, solver: str) -> Solution:
    total = float(_at(loss, choice).sum())
    return Solution(choice, total, int(_at(size, choice).sum()), min(bound, total), solver)


def _hull_greedy(loss: Floats, size: Ints, budget: int) -> tuple[Ints, float, float]:
    """Greedy choice, lower bound and multiplier of the linear relaxation."""
    unit, target, rate, extra, choice = _hull_steps(loss, size)
    room = budget - int(_at(size, choice).sum())
    if room < 0:
        raise BudgetError(
            f"{budget} bytes for the experts; the options need at least {budget - room}; raise the budget"
        )
    reach = _reachable(size, budget)
    order = np.argsort(-rate, kind="stable")
    fits = int(np.searchsorted(np.cumsum(extra[order]), room, side="right"))
    taken = order[:fits]
    last = np.full(len(loss), -1)
    np.maximum.at(last, unit[taken], taken)
    moved = last >= 0
    choice[moved] = target[last[moved]]
    multiplier = float(rate[order[fits]]) if fits < len(order) else 0.0
    return choice, relaxation(loss, size, reach, multiplier), multiplier


def _reachable(size: Ints, budget: int) -> int:
    """The most bytes within the budget that sizes can add up to as far as their common divisor tells."""
    base = size.min(1)
    divisor = int(np.gcd.reduce((size - base[:, None]).ravel()))
    total = int(base.sum())
    return total + (budget - total) // divisor * divisor if divisor else budget


def _hull_steps(loss: Floats, size: Ints) -> tuple[Ints, Ints, Floats, Ints, Ints]:
    """Steps along the lower convex hull of every unit, from its smallest option to its least loss.

    Returns unit, option after the step, loss saved per byte, bytes added (each (steps,)), and the options to start from
    (units,). A later step of a unit has a larger index and no larger rate than an earlier one.
    """
    units = np.arange(len(loss))
    smallest = np.where(np.isfinite(loss), size, np.iinfo(np.int64).max).min(1, keepdims=True)
    start = np.where(size == smallest, loss, np.inf).argmin(1)
    here, rates = start.copy(), np.full(len(loss), np.inf)
    parts = [(units[:0], units[:0], rates[:0], units[:0])]
    while True:
        saved = _at(loss, here)[:, None] - loss
        extra = size - _at(size, here)[:, None]
        slope = np.where((saved > 0) & (extra > 0), saved / np.maximum(extra, 1), -np.inf)
        best = np.where(slope == slope.max(1, keepdims=True), extra, -1).argmax(1)  # of equally steep steps the longest
        go = np.flatnonzero(_at(slope, best) > 0)
        if not len(go):
            break
        rates[go] = np.minimum(rates[go], _at(slope, best)[go])  # equal up to rounding where points are on one line
        parts.append((go, best[go], rates[go], _at(extra, best)[go]))
        here[go] = best[go]
    unit, target, rate, added = (np.concatenate(p) for p in zip(*parts, strict=True))
    return unit, target, rate, added, start


def _fill(choice: Ints, loss: Floats, size: Ints, budget: int) -> None:
    """Spend what is left, in place: the single change of option that fits and saves most, until there is none."""
    room = budget - int(_at(size, choice).sum())
    saved, extra = _at(loss, choice)[:, None] - loss, size - _at(size, choice)[:, None]
    while True:
        gain = np.where(extra <= room, saved, 0.0)
        unit, option = divmod(int(gain.argmax()), loss.shape[1])
        if gain[unit, option] <= 0:
            return
        choice[unit] = option
        room -= int(extra[unit, option])
        saved[unit] = loss[unit, option] - loss[unit]
        extra[unit] = size[unit] - size[unit, option]


def _exchange(choice: Ints, loss: Floats, size: Ints, budget: int) -> None:
    """Improve in place by the best pair of changes in two units that together fit, until there is none."""
    options = loss.shape[1]
    for _ in range(EXCHANGES):
        room = budget - int(_at(size, choice).sum())
        saved, extra = (_at(loss, choice)[:, None] - loss).ravel(), (size - _at(size, choice)[:, None]).ravel()
        order = np.flatnonzero(np.isfinite(saved))
        order = order[np.argsort(extra[order], kind="stable")]
        saved, extra = saved[order], extra[order]
        running = np.maximum.accumulate(saved)
        first = np.maximum.accumulate(np.where(saved == running, np.arange(len(saved)), 0))
        upto = np.searchsorted(extra, room - extra, side="right") - 1
        partner = first[np.maximum(upto, 0)]
        gain = np.where((upto >= 0) & (order // options != order[partner] // options), saved + saved[partner], -np.inf)
        best = int(gain.argmax())
        if not gain[best] > 1e-12 * abs(saved[best]):
            return
        for i in (best, partner[best]):
            unit, option = divmod(int(order[i]), options)
            choice[unit] = option
        _fill(choice, loss, size, budget)


def _core(
    keep: NDArray[np.bool_], loss: Floats, size: Ints, room: int, offset: float, gap: float, time_limit: float
) -> tuple[Ints | None, bool]:
    """Best kept options (units,) within ``room`` bytes, None if nothing fits; and whether that is proven.

    Losses count in thousandths of ``gap`` and bytes in their common divisor, so that the absolute tolerances of HiGHS
    are far below one of either. A constant variable carries ``offset``, so that the relative tolerance is one of the
    whole.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    unit, option = np.nonzero(keep)
    base = np.where(keep, size, np.iinfo(np.int64).max).min(1)
    room -= int(base.sum())
    if room < 0:
        return None, True
    least = np.where(keep, loss, np.inf).min(1)
    extra = (size - base[:, None])[unit, option]
    divisor = max(1, int(np.gcd.reduce(extra)))
    n = len(unit)
    one = csr_array((np.ones(n), (unit, np.arange(n))), shape=(len(loss), n + 1))
    total = csr_array(np.append(extra // divisor, 0).astype(np.float64)[None])
    value = np.append((loss - least[:, None])[unit, option], least.sum() + offset) * (1000 / gap)
    with _stdout_to_stderr():
        result = milp(
            value,
            constraints=[LinearConstraint(one, 1, 1), LinearConstraint(total, -np.inf, room // divisor)],
            integrality=np.ones(n + 1),
            bounds=Bounds(np.append(np.zeros(n), 1), 1),
            options={"time_limit": time_limit, "mip_rel_gap": TOLERANCE},
        )
    if result.x is None:
        return None, result.status == 2
    weight = np.zeros(loss.shape)
    weight[unit, option] = result.x[:n]
    return np.asarray(weight.argmax(1), dtype=np.int64), result.status == 0


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """HiGHS writes debugging lines to file descriptor 1, which belongs to the command's own output."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
