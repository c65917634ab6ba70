"""Exact one-dimensional k-means against all partitions, and the maps made of it."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mopeq.allocate.kmeans import kmeans, kmeans_map
from mopeq.errors import MapError
from mopeq.precision import DEFAULT_REST, FULL, GROUPS, Precision, PrecisionMap
from tables import OPTIONS, P2, P3, P4, drawn, model


def spread(values: np.ndarray, labels: np.ndarray) -> float:
    return sum(float(((values[labels == c] - values[labels == c].mean()) ** 2).sum()) for c in np.unique(labels))


def least_spread(values: np.ndarray, clusters: int) -> float:
    """Over all ways to cut the sorted values: an optimal cluster is an interval."""
    x = np.sort(values)
    cuts = itertools.combinations(range(1, len(x)), clusters - 1)
    return min(sum(float(((p - p.mean()) ** 2).sum()) for p in np.split(x, cut)) for cut in cuts)


numbers = st.one_of(
    st.lists(st.floats(-1e3, 1e3).map(lambda v: round(v, 3)), min_size=1, max_size=12),
    st.lists(st.integers(0, 4).map(float), min_size=1, max_size=12),
)


@settings(deadline=None, max_examples=150)
@given(numbers, st.integers(1, 5))
def test_no_partition_is_better(values: list[float], clusters: int) -> None:
    x = np.array(values)
    labels = kmeans(x, clusters)
    distinct = min(clusters, len(np.unique(x)))
    assert sorted(set(labels.tolist())) == list(range(distinct))
    means = [x[labels == c].mean() for c in range(distinct)]
    assert means == sorted(means)
    assert all(len(set(labels[x == v].tolist())) == 1 for v in x)
    best = least_spread(x, distinct)
    assert spread(x, labels) <= best * (1 + 1e-9) + 1e-9 * float(np.square(x - x.mean()).sum())


def test_longer_rows_against_the_quadratic_programme() -> None:
    x = np.sort(np.random.default_rng(0).lognormal(size=150))
    first, second = np.r_[0, x.cumsum()], np.r_[0, (x * x).cumsum()]

    def cost(a: int, b: int) -> float:
        return float(second[b] - second[a] - (first[b] - first[a]) ** 2 / (b - a))

    best = [cost(0, b) if b else np.inf for b in range(151)]
    for k in range(2, 6):
        best = [min((best[a] + cost(a, b) for a in range(1, b)), default=np.inf) for b in range(151)]
        assert spread(x, kmeans(x, k)) == pytest.approx(best[150], rel=1e-9)


def test_close_values_far_from_zero() -> None:
    x = 1e9 + np.array([0.0, 0.1, 0.2, 1.0, 1.1, 2.0])
    assert kmeans(x, 3).tolist() == [0, 0, 0, 1, 1, 2]


def test_the_order_of_values_does_not_matter() -> None:
    x = np.random.default_rng(1).lognormal(size=200)
    shuffle = np.random.default_rng(2).permutation(200)
    assert np.array_equal(kmeans(x, 3)[shuffle], kmeans(x[shuffle], 3))


def test_thirty_thousand_points_take_less_than_two_seconds() -> None:
    x = np.random.default_rng(0).lognormal(size=30_000)
    start = time.process_time()
    assert len(np.unique(kmeans(x, 3))) == 3
    assert time.process_time() - start < 2


def test_the_highest_scores_get_the_most_bits_in_each_layer() -> None:
    inventory = model()
    scores = {0: (1.0, 1.1, 5.0, 5.1, 9.0, 9.1, 9.2, 1.2), 1: tuple(range(8)), 2: (0.0,) * 7 + (1.0,)}
    made = kmeans_map(inventory, scores, [P4, P2, P3])
    assert made.experts["gate_up"] == made.experts["down"]
    assert [p.bits for p in made.experts["down"][0]] == [2, 2, 3, 3, 4, 4, 4, 2]
    assert [p.bits for p in made.experts["down"][1]] == sorted(p.bits for p in made.experts["down"][1])
    assert made.rest == DEFAULT_REST
    # two distinct scores take the lowest and the highest level
    assert [p.bits for p in made.experts["down"][2]] == [2] * 7 + [4]


def test_the_scope_decides_who_is_compared() -> None:
    inventory = model(layers=2)
    scores = {0: tuple(1.0 + 0.01 * e for e in range(8)), 1: tuple(100.0 + e for e in range(8))}
    by_layer = kmeans_map(inventory, scores, OPTIONS, scope="layer")
    by_model = kmeans_map(inventory, scores, OPTIONS, scope="model")
    assert [p.bits for p in by_layer.experts["down"][0]] == [p.bits for p in by_layer.experts["down"][1]]
    assert {p.bits for p in by_model.experts["down"][0]} == {2}
    assert {p.bits for p in by_model.experts["down"][1]} == {3, 4}


@pytest.mark.parametrize(
    ("distinct", "levels", "bits"),
    [(1, (2, 3, 4), [3]), (2, (2, 3, 4), [2, 4]), (1, (2, 4), [2]), (3, (2, 3, 4, 8), [2, 3, 8]), (1, (5,), [5])],
)
def test_fewer_scores_than_levels_take_levels_evenly(distinct: int, levels: tuple[int, ...], bits: list[int]) -> None:
    inventory = model(layers=1, experts=8)
    made = kmeans_map(inventory, {0: tuple(float(e % distinct) for e in range(8))}, [Precision(b, 32) for b in levels])
    assert sorted({p.bits for p in made.experts["down"][0]}) == bits


def test_maps_carry_what_they_are_given_and_survive_json() -> None:
    inventory = model(uneven=True)
    rest = {"lm_head": FULL}
    made = kmeans_map(inventory, drawn(inventory), OPTIONS, scope="model", rest=rest, note={"method": "kmeans"})
    assert made.rest == rest
    assert PrecisionMap.from_json(made.to_json()) == made
    assert made.layers == inventory.experts
    assert all(set(row) <= set(OPTIONS) for g in GROUPS for row in made.experts[g].values())


def test_what_cannot_be_clustered_is_refused() -> None:
    inventory = model()
    with pytest.raises(MapError, match="scope 'all'; expected layer or model"):
        kmeans_map(inventory, drawn(inventory), OPTIONS, scope="all")
    with pytest.raises(MapError, match="no levels for k-means"):
        kmeans_map(inventory, drawn(inventory), [])
    with pytest.raises(MapError, match="scores do not have one value for each expert"):
        kmeans_map(inventory, drawn(model(layers=2)), OPTIONS)
    scores = drawn(inventory)
    scores[1] = (float("nan"), *scores[1][1:])
    with pytest.raises(MapError, match=r"scores of layers \[1\] are not finite"):
        kmeans_map(inventory, scores, OPTIONS)
    with pytest.raises(MapError, match="layer 0 gate_up at 4g128"):
        kmeans_map(inventory, drawn(inventory), [Precision(4, 128)])
