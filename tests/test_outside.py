"""Precisions outside the experts: fewer bits where the judge finds them cheap, in the same bytes, or none fewer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mopeq.allocate import allocate, predicted
from mopeq.cli import main
from mopeq.evaluate import Divergence
from mopeq.evaluate.bootstrap import ratio_estimate
from mopeq.measure import open_model
from mopeq.outside import LEVELS, shared_out
from mopeq.precision import DEFAULT_REST, GROUPS, Precision, PrecisionMap
from mopeq.spec import Inventory
from mopeq.stats import Stats, cost_metric

Make = Callable[..., Path]
OPTIONS = [Precision(bits, 32) for bits in (2, 3, 4)]
COST = "fisher_error"


@pytest.fixture
def stats(tiny_model: Make) -> Stats:
    """Losses that fall fourfold with every bit."""
    inventory = open_model(tiny_model("olmoe")).inventory
    draw = np.random.default_rng(0)
    metrics: dict[str, dict[int, list[float]]] = {}
    for group in GROUPS:
        for layer, count in inventory.experts.items():
            size = draw.lognormal(0, 1, count)
            for p in OPTIONS:
                metrics.setdefault(cost_metric(COST, group, p), {})[layer] = (size * 4.0 ** (2 - p.bits)).tolist()
    return Stats(inventory, {}, {}).with_metrics(metrics)


def judged(stats: Stats, harm: Mapping[str, float]) -> Callable[[PrecisionMap], Divergence]:
    """KL is the predicted loss, and ``harm`` for each group times fourfold with every bit less outside the experts."""

    def judge(precisions: PrecisionMap) -> Divergence:
        outside = sum(h * 4.0 ** (4 - precisions.rest[group].bits) for group, h in harm.items())
        shape = np.random.default_rng(0).normal(0, 1e-6, 32)
        windows = tuple(10 * (0.01 * predicted(stats, COST, precisions) + outside + shape))
        estimate = ratio_estimate(windows, [10] * 32)
        return Divergence(estimate, estimate, 320, "same", (10,) * 32, windows, (10,) * 32)

    return judge


@pytest.mark.parametrize(
    ("attention", "head"), [(1e-6, 1e-6), (1e-6, 50.0), (50.0, 50.0)], ids=["cheap", "a dear head", "dear"]
)
def test_bits_go_where_they_are_worth_most(stats: Stats, attention: float, head: float) -> None:
    inventory: Inventory = stats.model
    made = allocate(stats, budget="3.0bpw", cost=COST, options=OPTIONS)
    size = inventory.total_bytes(made)
    again = partial(allocate, stats, budget=f"{size}B", cost=COST, options=OPTIONS)
    judge = judged(stats, {"attention": attention, "lm_head": head})
    found = shared_out(
        made, inventory, set(DEFAULT_REST), partial(predicted, stats, COST), lambda rest: again(rest=rest), judge
    ).precisions
    assert inventory.total_bytes(found) <= size
    lower = {group for group in ("attention", "lm_head") if found.rest[group] in LEVELS}
    assert lower == {group for group, harm in (("attention", attention), ("lm_head", head)) if harm < 1}
    if lower:
        assert judge(found).kl.value < judge(made).kl.value
    else:
        assert found == made


def test_groups_that_are_named_stay(stats: Stats) -> None:
    made = allocate(stats, budget="3.0bpw", cost=COST, options=OPTIONS)
    again = partial(allocate, stats, budget=f"{stats.model.total_bytes(made)}B", cost=COST, options=OPTIONS)
    judge = judged(stats, {"attention": 1e-6, "lm_head": 1e-6})
    found = shared_out(
        made, stats.model, {"lm_head"}, partial(predicted, stats, COST), lambda rest: again(rest=rest), judge
    )
    assert found.precisions.rest["attention"] == made.rest["attention"]
    assert found.precisions.rest["lm_head"] in LEVELS
    assert "lm_head" in found.sentence


@pytest.mark.parametrize("words", [["quantize", "--uniform", "3", "--method", "rtn"], ["allocate", "--budget", "3bpw"]])
def test_auto_is_for_a_budget_that_text_is_there_for(
    words: list[str], stats: Stats, tiny_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "stats.json"
    if words[0] == "quantize":
        model = tiny_model("olmoe")
    else:
        from mopeq.stats import write_json

        write_json(model, stats.to_json())
    assert main([words[0], str(model), "-o", str(tmp_path / "out"), *words[1:], "--rest", "auto"]) == 2
    assert "budget" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
