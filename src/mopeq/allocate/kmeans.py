"""Exact one-dimensional k-means, and precision maps from its clusters as MoPEQ makes them (arXiv 2509.02512)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mopeq.errors import MapError
from mopeq.precision import DEFAULT_REST, GROUPS, Precision, PrecisionMap
from mopeq.spec import Inventory
from mopeq.stats import PerExpert

__all__ = ["kmeans", "kmeans_map"]


def kmeans(values: ArrayLike, clusters: int) -> NDArray[np.int64]:
    """Cluster of each value, 0 for the cluster of least mean: a partition of least within-cluster sum of squares.

    Dynamic programme over the sorted distinct values with divide and conquer, O(clusters * n log n); deterministic,
    equal values always fall together, and every cluster is non-empty. With fewer distinct values than clusters every
    distinct value is a cluster of its own and the labels are the first ones.
    """
    points, inverse, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    n, k = len(points), min(clusters, len(points))
    x = points - points.mean()
    weight = np.concatenate([[0.0], np.cumsum(counts)])
    first = np.concatenate([[0.0], np.cumsum(counts * x)])
    second = np.concatenate([[0.0], np.cumsum(counts * x * x)])

    def within(start: NDArray[np.int64], stop: NDArray[np.int64]) -> NDArray[np.float64]:
        """Sum of squares about the mean of points start..stop-1, start < stop."""
        mean_part = (first[stop] - first[start]) ** 2 / (weight[stop] - weight[start])
        return np.asarray(second[stop] - second[start] - mean_part)

    stops = np.arange(1, n + 1)
    best = np.concatenate([[np.inf], within(np.zeros(n, np.int64), stops)])
    cuts = []
    for c in range(1, k):
        best, cut = _extend(best, within, c)
        cuts.append(cut)
    edges = [n]
    for cut in reversed(cuts):
        edges.append(int(cut[edges[-1]]))
    return np.asarray(
        np.searchsorted(np.array(edges[:0:-1]), np.arange(n), side="right")[inverse.ravel()], dtype=np.int64
    )


def _extend(best: NDArray[np.float64], within: Any, c: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """One more cluster: for every stop i, min over c <= j < i of best[j] + within(j, i), and the leftmost such j.

    The best j does not fall as i grows, so stops are solved at halving strides, each between its neighbours' answers.
    """
    n = len(best) - 1
    cost, cut = np.full(n + 1, np.inf), np.full(n + 1, n, dtype=np.int64)
    cut[: c + 1] = c
    stride = 1 << max(0, (n - c - 1).bit_length())
    while stride:
        stops = np.arange(c + stride, n + 1, 2 * stride)
        low = cut[stops - stride]
        high = np.minimum(np.where(stops + stride <= n, cut[np.minimum(stops + stride, n)], n), stops - 1)
        length = high - low + 1
        begin = np.cumsum(length) - length
        j = np.arange(int(length.sum())) - np.repeat(begin - low, length)
        candidates = best[j] + within(j, np.repeat(stops, length))
        if len(stops):
            cost[stops] = np.minimum.reduceat(candidates, begin)
            hits = np.flatnonzero(candidates == np.repeat(cost[stops], length))
            cut[stops] = j[hits[np.searchsorted(hits, begin)]]
        stride //= 2
    return cost, cut


def kmeans_map(
    model: Inventory,
    scores: PerExpert,
    levels: Sequence[Precision],
    *,
    scope: str = "layer",
    rest: Mapping[str, Precision] | None = None,
    note: Mapping[str, Any] | None = None,
) -> PrecisionMap:
    """Clusters of scores to precisions: the cluster of highest mean gets the largest precision.

    ``scope`` ``layer`` clusters the experts of each layer apart, ``model`` all together. Both projection groups of an
    expert share its precision. Where there are fewer distinct scores than levels, u distinct scores take u levels
    spread evenly from the lowest to the highest; a single one takes the middle level (the lower of two middles).
    """
    if scope not in ("layer", "model"):
        raise MapError(f"scope {scope!r}; expected layer or model")
    ladder = sorted(set(levels))
    if not ladder:
        raise MapError("no levels for k-means; give precisions such as 2,3,4")
    if {layer: len(row) for layer, row in scores.items()} != model.experts:
        raise MapError(f"scores do not have one value for each expert of this {model.model_type}; measure this model")
    parts = [[layer] for layer in scores] if scope == "layer" else [list(scores)]
    chosen: dict[int, tuple[Precision, ...]] = {}
    for layers in parts:
        values = np.array([v for layer in layers for v in scores[layer]], dtype=np.float64)
        if not np.isfinite(values).all():
            raise MapError(f"scores of layers {layers[:4]} are not finite; measure again")
        labels = kmeans(values, len(ladder))
        steps = _spread(int(labels.max()) + 1, len(ladder))
        given = iter(ladder[steps[i]] for i in labels)
        chosen.update({layer: tuple(next(given) for _ in scores[layer]) for layer in layers})
    made = PrecisionMap(
        {g: dict(sorted(chosen.items())) for g in GROUPS}, DEFAULT_REST if rest is None else rest, note or {}
    )
    model.check(made)
    return made


def _spread(distinct: int, levels: int) -> list[int]:
    if distinct == 1:
        return [(levels - 1) // 2]
    return [math.ceil(i * (levels - 1) / (distinct - 1) - 0.5) for i in range(distinct)]
