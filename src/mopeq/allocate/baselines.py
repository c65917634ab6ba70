"""Controls: maps of equal bytes that use less knowledge, to tell what an allocator's knowledge is worth.

Precisions only change places between units of the same shape, so a control takes exactly the bytes of the map it
copies. Where every expert of that map has one precision for both groups, experts change places as wholes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mopeq.allocate.budget import Budget, check_budget, parse_budget
from mopeq.errors import MapError
from mopeq.precision import DEFAULT_REST, GROUPS, LEFT_OUT, Precision, PrecisionMap, ProjectionGroup
from mopeq.spec import Inventory
from mopeq.stats import PerExpert, Unit

__all__ = ["interpolated_map", "inverted_map", "random_map", "ranked_map", "uniform_map"]


def random_map(model: Inventory, like: PrecisionMap, seed: int = 0) -> PrecisionMap:
    """The precisions of ``like`` dealt out at random among units of equal shape."""
    keys = np.random.default_rng(seed)
    note = {"method": "random", "histogram_of": like.note.get("method", ""), "seed": seed}
    return _dealt(model, like, lambda units: keys.random(len(units)), note)


def ranked_map(model: Inventory, scores: PerExpert, like: PrecisionMap, name: str = "score") -> PrecisionMap:
    """The precisions of ``like`` dealt out by score: the expert of highest score gets the largest.

    ``name`` is noted.
    """
    note = {"method": "ranked", "score": name, "histogram_of": like.note.get("method", "")}
    return _dealt(model, like, lambda units: _scores(scores, units), note)


def inverted_map(model: Inventory, scores: PerExpert, like: PrecisionMap, name: str = "score") -> PrecisionMap:
    """The opposite of :func:`ranked_map`: the expert of highest score gets the smallest precision."""
    note = {"method": "inverted", "score": name, "histogram_of": like.note.get("method", "")}
    return _dealt(model, like, lambda units: -_scores(scores, units), note)


def uniform_map(
    model: Inventory,
    options: Sequence[Precision],
    budget: str | float | Budget | None = None,
    rest: Mapping[str, Precision] | None = None,
) -> PrecisionMap:
    """Every unit at one precision: the only option, or the one of most bytes within the budget."""
    rest = DEFAULT_REST if rest is None else rest
    if budget is None:
        if len(options) != 1:
            raise MapError(f"{len(options)} options for a uniform map without a budget; give one option, or a budget")
        made = PrecisionMap.uniform(model.experts, options[0], rest)
        model.check(made)
        return made
    asked = parse_budget(budget)
    maps = [PrecisionMap.uniform(model.experts, p, rest, {"method": "uniform", "budget": str(asked)}) for p in options]
    sized = sorted(((model.expert_bytes(m), i) for i, m in enumerate(maps)))
    if not sized:
        raise MapError("no options for a uniform map; give precisions such as 2,3,4")
    available = check_budget(asked, model, rest, sized[0][0])
    return maps[max(s for s in sized if s[0] <= available)[1]]


def interpolated_map(
    model: Inventory,
    options: Sequence[Precision],
    budget: str | float | Budget,
    *,
    granularity: str = "group",
    seed: int = 0,
    rest: Mapping[str, Precision] | None = None,
) -> PrecisionMap:
    """Uniform between two options: a random set of units at the larger one, as many as the budget holds.

    The two options are the neighbours, by bytes, between which the budget lies. ``granularity`` ``expert`` keeps both
    groups of an expert together.
    """
    rest = DEFAULT_REST if rest is None else rest
    asked = parse_budget(budget)
    if granularity not in ("group", "expert"):
        raise MapError(f"granularity {granularity!r}; expected group or expert")
    if LEFT_OUT in options:
        raise MapError("0 bits is an option of the knapsack, not of random maps; leave 0 out of the levels")
    if not options:
        raise MapError("no options to interpolate between; give precisions such as 2,3,4")
    sized = {p: model.expert_bytes(PrecisionMap.uniform(model.experts, p)) for p in options}
    ladder = sorted(sized, key=lambda p: (sized[p], p))
    available = check_budget(asked, model, rest, sized[ladder[0]])
    at = max(i for i, p in enumerate(ladder) if sized[p] <= available)
    low, high = ladder[at], ladder[min(at + 1, len(ladder) - 1)]
    groups: tuple[ProjectionGroup | None, ...] = GROUPS if granularity == "group" else (None,)
    units = [Unit(layer, e, g) for layer, n in model.experts.items() for e in range(n) for g in groups]
    room = available - sized[low]
    raised = set()
    for i in np.random.default_rng(seed).permutation(len(units)):
        extra = _unit_bytes(model, units[i], high) - _unit_bytes(model, units[i], low)
        if 0 < extra <= room:
            raised.add(units[i])
            room -= extra
    experts = {
        g: {
            layer: tuple(
                high if Unit(layer, e, g if granularity == "group" else None) in raised else low for e in range(n)
            )
            for layer, n in model.experts.items()
        }
        for g in GROUPS
    }
    note = {"method": "random", "budget": str(asked), "options": [str(low), str(high)], "granularity": granularity}
    return PrecisionMap(experts, rest, {**note, "seed": seed})


def _unit_bytes(model: Inventory, unit: Unit, precision: Precision) -> int:
    return sum(model.unit_bytes(unit.layer, g, precision) for g in ((unit.group,) if unit.group else GROUPS))


def _scores(scores: PerExpert, units: Sequence[Unit]) -> NDArray[np.float64]:
    try:
        return np.array([scores[u.layer][u.expert] for u in units], dtype=np.float64)
    except (KeyError, IndexError) as error:
        raise MapError("scores do not have one value for each expert of the map; measure this model") from error


def _dealt(model: Inventory, like: PrecisionMap, key: Any, note: Mapping[str, Any]) -> PrecisionMap:
    """The precisions of ``like`` given again, within each class of equal shapes, in the order of ``key(units)``."""
    model.check(like)
    tied = like.experts["gate_up"] == like.experts["down"]
    groups: tuple[ProjectionGroup | None, ...] = (None,) if tied else GROUPS
    classes: dict[tuple[Any, ...], list[Unit]] = {}
    for layer, count in model.experts.items():
        shape = model.layers[layer]
        for g in groups:
            kind = (shape.hidden_size, shape.intermediate_size, g)
            classes.setdefault(kind, []).extend(Unit(layer, e, g) for e in range(count))
    given: dict[Unit, Precision] = {}
    for units in classes.values():
        order = np.argsort(key(units), kind="stable")
        ladder = sorted(like.of(u.layer, u.expert, u.group or "gate_up") for u in units)
        given.update({units[i]: p for i, p in zip(order, ladder, strict=True)})
    experts = {
        g: {
            layer: tuple(given[Unit(layer, e, None if tied else g)] for e in range(n))
            for layer, n in model.experts.items()
        }
        for g in GROUPS
    }
    return PrecisionMap(experts, like.rest, note)
