"""Exchanges of precisions between units at equal bytes, accepted on measured divergence alone.

The knapsack adds up predicted losses; what units do to each other is not in them. An exchange gives one unit the next
larger option and another unit of the same shape, which has that, the smaller one: bytes stay as they are. Those that
the prediction holds against least are tried first, on text kept apart, and stay where the KL falls by more than the
interval of the paired difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mopeq.evaluate import Divergence, paired_difference
from mopeq.precision import GROUPS, LEFT_OUT, Precision, PrecisionMap
from mopeq.progress import Track, silent
from mopeq.stats import CostTable, Stats, cost_table

__all__ = ["Refined", "refined"]


@dataclass(frozen=True)
class Refined:
    """The map, how many exchanges it took of how many tried, and the KL before and after on the text of the judge."""

    precisions: PrecisionMap
    taken: int
    tried: int
    before: float
    after: float


def refined(
    made: PrecisionMap,
    stats: Stats,
    cost: str,
    options: Sequence[Precision],
    judge: Callable[[PrecisionMap], Divergence],
    tries: int,
    *,
    granularity: str = "group",
    track: Track = silent,
) -> Refined:
    """``made`` after at most ``tries`` exchanges, each judged once; every unit is in one of them at most,
    and super-experts are in none.

    cost, options, granularity: those that the map was made with.
    """
    table = cost_table(stats, cost, options, granularity)
    choice = _choice(table, made)
    best = judge(made)
    first, precisions = best.kl.value, made
    held = made.note.get("super_experts", ())
    moved = {i for i, unit in enumerate(table.units) if f"{unit.layer}.{unit.expert}" in held}
    tried = taken = 0
    for _ in track(range(tries), "exchange precisions", tries):
        pair = next((p for p in _exchanges(table, choice) if not moved & {*p}), None)
        if pair is None:
            break
        moved |= {*pair}
        other = choice.copy()
        other[list(pair)] = choice[list(pair[::-1])]
        proposed = table.to_map(other, made.rest, made.note)
        found = judge(proposed)
        tried += 1
        change = paired_difference(found, best)
        if change.excludes_zero and change.value < 0:
            choice, best, precisions, taken = other, found, proposed, taken + 1
    note = {**made.note, "exchanges": taken, "exchanges_tried": tried}
    return Refined(replace(precisions, note=note), taken, tried, first, best.kl.value)


def _choice(table: CostTable, made: PrecisionMap) -> NDArray[np.int64]:
    """The option of every unit."""
    index = {precision: i for i, precision in enumerate(table.options)}
    return np.array([index[made.of(u.layer, u.expert, u.group or GROUPS[0])] for u in table.units])


def _exchanges(table: CostTable, choice: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Pairs (up, down) of units of one shape and neighbouring options, the least predicted rise of the loss first."""
    ladders: dict[tuple[int, ...], list[int]] = {}
    for unit, row in enumerate(table.size):
        ladders.setdefault(tuple(row), []).append(unit)
    pairs: list[tuple[float, int, int]] = []
    for sizes, units in ladders.items():
        order = np.argsort(sizes, kind="stable")
        for low, high in pairwise(i for i in order if table.options[i] != LEFT_OUT):  # a unit is not left out alone
            gain = table.loss[:, low] - table.loss[:, high]
            up = sorted((u for u in units if choice[u] == low), key=lambda u: -gain[u])
            down = sorted((u for u in units if choice[u] == high), key=lambda u: gain[u])
            pairs += [(gain[v] - gain[u], u, v) for u, v in _frontier(up, down)]
    yield from ((u, v) for _, u, v in sorted(pairs))


def _frontier(up: Sequence[int], down: Sequence[int], width: int = 64) -> Iterator[tuple[int, int]]:
    """Pairs of the first of both lists; the i-th with the j-th where i * j is small, the others come later anyway."""
    for i, u in enumerate(up[:width]):
        for v in down[: max(1, width // (i + 1))]:
            yield u, v
