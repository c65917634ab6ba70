"""Precisions outside the experts, chosen together with those of the experts within the same bytes.

Attention, dense layers, shared experts and head have no measured cost. What a precision of such a group costs is the
KL that it adds to a map, on text kept apart, with all else as it was. Losses of experts are predicted; one factor, the
map's own KL over its predicted loss, puts them in the same unit. Every combination of precisions leaves the experts
what is left of the bytes; the one of least sum is judged, and taken where its KL is lower by more than the interval.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from itertools import product

from mopeq.errors import BudgetError
from mopeq.evaluate import Divergence, paired_difference
from mopeq.precision import Precision, PrecisionMap
from mopeq.progress import Track, silent
from mopeq.spec import Inventory

__all__ = ["LEVELS", "Shared", "shared_out"]

LEVELS = (Precision(6, 128), Precision(5, 128), Precision(4, 128))
"""What a group may have in the place of the precision it has."""


@dataclass(frozen=True)
class Shared:
    """The map, and a sentence that says what it has outside the experts, and why."""

    precisions: PrecisionMap
    sentence: str


def shared_out(
    made: PrecisionMap,
    inventory: Inventory,
    free: Collection[str],
    loss: Callable[[PrecisionMap], float],
    again: Callable[[Mapping[str, Precision]], PrecisionMap],
    judge: Callable[[PrecisionMap], Divergence],
    track: Track = silent,
) -> Shared:
    """``made``, or a map of no more bytes that has fewer bits in some of the groups ``free`` and more in experts.

    loss: predicted loss of a map's experts. again: the allocator's map of the bytes of ``made`` with other precisions
    outside the experts; :class:`BudgetError` where there is none. judge: the KL of a map, those precisions included.
    """
    groups = [group for group in sorted(free) if inventory.linears.get(group)]
    start = judge(made)
    unit = start.kl.value / max(loss(made), 1e-30)
    levels = {g: [p for p in LEVELS if _bytes(inventory, g, p) < _bytes(inventory, g, made.rest[g])] for g in groups}
    tries = [(group, precision) for group in groups for precision in levels[group]]
    added = {(group, made.rest[group]): 0.0 for group in groups}
    for group, precision in track(tries, "try precisions outside the experts", len(tries)):
        found = judge(replace(made, rest={**made.rest, group: precision}))
        added[group, precision] = found.kl.value - start.kl.value
    best, least = made, start.kl.value
    for chosen in product(*([made.rest[group], *levels[group]] for group in groups)):
        try:
            other = again({**made.rest, **dict(zip(groups, chosen, strict=True))})
        except BudgetError:
            continue
        foretold = unit * loss(other) + sum(added[key] for key in zip(groups, chosen, strict=True))
        if foretold < least:
            best, least = other, foretold
    if best.rest == made.rest:
        return Shared(made, f"outside the experts as it was: no other of {len(tries)} precisions tried is better")
    found = judge(best)
    gain = paired_difference(found, start)
    told = ", ".join(f"{group} {best.rest[group]}" for group in groups)
    interval = "" if gain.low is None or gain.high is None else f" ({gain.low:+.4g} to {gain.high:+.4g})"
    seen = f"KL {found.kl.value:.4g} against {start.kl.value:.4g}, difference {gain.value:+.4g}{interval}"
    if gain.excludes_zero and gain.value < 0:
        return Shared(best, f"outside the experts {told}, in the same bytes: {seen}")
    return Shared(made, f"outside the experts as it was: {told} is not better, {seen}")


def _bytes(inventory: Inventory, group: str, precision: Precision) -> int:
    return inventory.rest_bytes({group: precision})
