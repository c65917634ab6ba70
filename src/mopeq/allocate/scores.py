"""Scores: one number per expert from measured metrics, the larger the more bits it should get."""

from __future__ import annotations

from math import prod

from mopeq.errors import MapError
from mopeq.stats import PerExpert, Stats

__all__ = ["normalized", "score"]


def normalized(rows: PerExpert) -> dict[int, tuple[float, ...]]:
    """Each layer divided by the sum of its absolute values; a layer of zeros becomes equal shares."""
    made = {}
    for layer, row in rows.items():
        total = sum(abs(v) for v in row)
        made[layer] = tuple(v / total for v in row) if total else (1 / len(row),) * len(row)
    return made


def score(stats: Stats, expression: str) -> dict[int, tuple[float, ...]]:
    """``{layer: (one score per expert)}`` of an expression such as ``inverse_norm`` or ``frequency*hessian_trace``.

    One metric is taken as measured, so that it compares across layers in its own unit. Factors of a product are
    normalized within their layer first (:func:`normalized`), since their units differ. Raises :class:`MapError` on an
    unknown metric.
    """
    names = [name.strip() for name in expression.split("*")]
    if not all(names):
        raise MapError(
            f"score {expression!r}; expected a metric, or metrics joined by * such as frequency*hessian_trace"
        )
    rows = [stats.metric(name) for name in names]
    if len(rows) == 1:
        return {layer: tuple(row) for layer, row in rows[0].items()}
    factors = [normalized(r) for r in rows]
    return {layer: tuple(prod(v) for v in zip(*(f[layer] for f in factors), strict=True)) for layer in factors[0]}
