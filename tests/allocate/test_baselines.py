"""Controls take the same bytes, and differ as they say."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mopeq.allocate import interpolated_map, inverted_map, kmeans_map, knapsack_map, random_map, ranked_map, uniform_map
from mopeq.errors import BudgetError, MapError
from mopeq.precision import DEFAULT_REST, FULL, GROUPS, LEFT_OUT, Precision, PrecisionMap
from tables import OPTIONS, P2, P3, P4, drawn, measured, model


def histogram_of(made: PrecisionMap, group: str, layers: list[int]) -> list[Precision]:
    return sorted(p for g in GROUPS if g == group for k in layers for p in made.experts[g][k])


@pytest.mark.parametrize("granularity", ["group", "expert"])
def test_controls_take_exactly_the_same_bytes(granularity: str) -> None:
    stats = measured(model(uneven=True))
    ours = knapsack_map(stats, "fisher_error", 3.1, granularity=granularity)
    scores = drawn(stats.model, 5)
    controls = [random_map(stats.model, ours, seed) for seed in range(3)]
    controls += [ranked_map(stats.model, scores, ours), inverted_map(stats.model, scores, ours)]
    for made in controls:
        assert stats.model.total_bytes(made) == stats.model.total_bytes(ours)
        assert made.histogram() == ours.histogram()
        assert made.rest == ours.rest
        assert (made.experts["gate_up"] == made.experts["down"]) == (granularity == "expert")
        for group in GROUPS:
            for layers in ([0, 1], [2]):  # the last layer's shapes are its own
                assert histogram_of(made, group, layers) == histogram_of(ours, group, layers)


def test_random_maps_differ_by_seed_only() -> None:
    stats = measured()
    ours = knapsack_map(stats, "fisher_error", 3.1)
    assert random_map(stats.model, ours, 1) == random_map(stats.model, ours, 1)
    assert random_map(stats.model, ours, 1).experts != random_map(stats.model, ours, 2).experts
    assert random_map(stats.model, ours, 1).note == {"method": "random", "histogram_of": "knapsack", "seed": 1}


def test_the_highest_scores_take_the_largest_precisions() -> None:
    inventory = model(layers=2, experts=3)
    like = PrecisionMap.uniform(inventory.experts, P2)
    rows = {0: (P4, P2, P3), 1: (P3, P2, P2)}
    like = PrecisionMap(dict.fromkeys(GROUPS, rows), {})
    scores = {0: (1.0, 2.0, 6.0), 1: (5.0, 3.0, 4.0)}
    ranked = ranked_map(inventory, scores, like, "frequency")
    assert ranked.experts["down"] == {0: (P2, P2, P4), 1: (P3, P2, P3)}
    assert ranked.experts["gate_up"] == ranked.experts["down"]
    assert ranked.note["score"] == "frequency"
    inverted = inverted_map(inventory, scores, like)
    assert inverted.experts["down"] == {0: (P4, P3, P2), 1: (P2, P3, P2)}


def test_ranking_by_the_scores_of_a_model_wide_map_gives_it_back() -> None:
    inventory = model()
    scores = drawn(inventory)
    made = kmeans_map(inventory, scores, OPTIONS, scope="model")
    assert ranked_map(inventory, scores, made).experts == made.experts
    assert inverted_map(inventory, scores, made).experts != made.experts


def test_scores_of_another_model_are_refused() -> None:
    inventory = model()
    like = PrecisionMap.uniform(inventory.experts, P2)
    with pytest.raises(MapError, match="scores do not have one value for each expert of the map"):
        ranked_map(inventory, drawn(model(layers=2)), like)
    with pytest.raises(MapError, match="the precision map is for another model"):
        random_map(inventory, PrecisionMap.uniform({0: 8}, P2))


def test_uniform_maps() -> None:
    inventory = model()
    assert uniform_map(inventory, [P3]) == PrecisionMap.uniform(inventory.experts, P3)
    assert uniform_map(inventory, [P3], rest={}).rest == {}
    assert uniform_map(inventory, OPTIONS, 4.0).histogram() == {P3: 48}
    assert uniform_map(inventory, OPTIONS, 4.625).histogram() == {P4: 48}
    coarse = Precision(3, -1)
    assert uniform_map(inventory, [P2, coarse, P3], 3.5).histogram() == {coarse: 48}
    total = inventory.total_bytes(PrecisionMap.uniform(inventory.experts, P4, DEFAULT_REST))
    assert uniform_map(inventory, OPTIONS, f"{total - 1}B").histogram() == {P3: 48}


def test_uniform_maps_that_cannot_be_made() -> None:
    inventory = model()
    with pytest.raises(MapError, match="3 options for a uniform map without a budget"):
        uniform_map(inventory, OPTIONS)
    with pytest.raises(MapError, match="0 options for a uniform map without a budget"):
        uniform_map(inventory, [])
    with pytest.raises(MapError, match="no options for a uniform map"):
        uniform_map(inventory, [], 3.0)
    with pytest.raises(BudgetError, match="below the smallest map"):
        uniform_map(inventory, OPTIONS, 2.0)
    with pytest.raises(MapError, match="4g128"):
        uniform_map(inventory, [Precision(4, 128)])


@settings(deadline=None, max_examples=30)
@given(st.floats(2.5625, 5.5), st.integers(0, 1000), st.booleans(), st.booleans())
def test_interpolated_maps_fill_the_budget(bits: float, seed: int, uneven: bool, tied: bool) -> None:
    inventory = model(uneven=uneven)
    made = interpolated_map(inventory, OPTIONS, bits, seed=seed, granularity="expert" if tied else "group")
    used = inventory.expert_bytes(made)
    assert used <= bits * inventory.expert_parameters / 8
    low, high = made.note["options"]
    step = inventory.unit_bytes(0, "gate_up", P3) - inventory.unit_bytes(0, "gate_up", P2)
    ceiling = inventory.expert_bytes(PrecisionMap.uniform(inventory.experts, P4))
    assert used >= min(bits * inventory.expert_parameters / 8 - 2 * step, ceiling)
    assert {str(p) for p in made.histogram()} <= {low, high}
    assert not tied or made.experts["gate_up"] == made.experts["down"]


def test_interpolated_maps_differ_by_seed() -> None:
    inventory = model()
    a, b = (interpolated_map(inventory, OPTIONS, 3.0, seed=s) for s in (0, 1))
    assert a.experts != b.experts
    assert a == interpolated_map(inventory, OPTIONS, 3.0, seed=0)
    assert interpolated_map(inventory, [P3], 16, rest={"lm_head": FULL}).histogram() == {P3: 48}


def test_interpolated_maps_that_cannot_be_made() -> None:
    with pytest.raises(BudgetError, match="below the smallest map"):
        interpolated_map(model(), OPTIONS, 2.5)
    with pytest.raises(MapError, match="no options"):
        interpolated_map(model(), [], 3.0)
    with pytest.raises(MapError, match="0 bits is an option of the knapsack"):
        interpolated_map(model(), [LEFT_OUT, *OPTIONS], 3.0)
    with pytest.raises(MapError, match="granularity 'layer'"):
        interpolated_map(model(), OPTIONS, 3.0, granularity="layer")
