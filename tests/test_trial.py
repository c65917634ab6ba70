"""Maps tried in memory against the same maps packed and loaded, and what the guard makes of a comparison."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mopeq.allocate import random_map, uniform_map
from mopeq.data.text import text_windows
from mopeq.errors import DataError, InputError
from mopeq.evaluate import Divergence
from mopeq.evaluate.bootstrap import ratio_estimate
from mopeq.load import load, load_original, load_tokenizer
from mopeq.measure import Calibration, open_model
from mopeq.precision import FULL, MATRICES, Precision, PrecisionMap, ProjectionGroup
from mopeq.qtensor import QTensor, pack, pack_full, rows_of
from mopeq.quantize import pack_model, quantize
from mopeq.quantizers import rtn
from mopeq.source import open_source, read_group
from mopeq.stats import read_json
from mopeq.trial import Trial, guarded, spare_windows

Make = Callable[..., Path]
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 60
BITS = [Precision(2, 32), Precision(3, 32), Precision(4, 32), FULL]
KEPT = {"attention": FULL, "lm_head": FULL, "dense_mlp": FULL, "shared_experts": FULL}


@pytest.fixture
def calibration(tmp_path: Path) -> Calibration:
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{i}: {TEXT}"}) for i in range(12)))
    return Calibration(str(path), samples=8, length=64, batch_size=4)


def mixed(opened: Any, seed: int) -> PrecisionMap:
    """Every unit at a precision of its own."""
    experts = {
        g: {
            layer: tuple(BITS[(3 * e + layer + seed + (g == "down")) % 4] for e in range(count))
            for layer, count in opened.inventory.experts.items()
        }
        for g in MATRICES
    }
    return PrecisionMap(experts, KEPT)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "llama4_text", "deepseek_v3"])
def test_a_map_tried_is_the_map_packed_and_loaded(family: str, tiny_model: Make, tmp_path: Path) -> None:
    folder = tiny_model(family, dtype=torch.bfloat16)  # what is outside the experts is stored in it
    opened, source = open_model(folder), open_source(folder)

    def unit(layer: Any) -> Callable[[int, ProjectionGroup, Precision], Sequence[QTensor]]:
        def made(expert: int, group: ProjectionGroup, precision: Precision) -> Sequence[QTensor]:
            weight = read_group(source, layer, group, [expert])
            if precision == FULL:
                return [pack_full(part) for part in weight[0].chunk(len(MATRICES[group]))]
            return [pack(c) for c in rows_of(rtn(weight, precision)[0], len(MATRICES[group]))]

        return made

    original = load_original(folder, dtype=torch.float32)
    ids = torch.arange(1, 25)[None]
    with torch.no_grad():
        before = original(input_ids=ids).logits
    trial = Trial(original, opened, {layer.index: unit(layer) for layer in opened.spec.layers})
    for seed in (0, 1, 0):
        precisions = mixed(opened, seed)
        at = tmp_path / f"{seed}"
        if not at.exists():
            pack_model(opened, precisions, at, method="rtn")
        with torch.no_grad():
            got = trial.take(precisions)(input_ids=ids).logits
            want = load(at, dtype=torch.float32)(input_ids=ids).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(got, before, atol=1e-2)
    with torch.no_grad():
        assert torch.equal(original(input_ids=ids).logits, before), "the original is as it was"


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_what_is_outside_the_experts_is_tried_as_it_is_packed(family: str, tiny_model: Make, tmp_path: Path) -> None:
    folder = tiny_model(family, dtype=torch.bfloat16)
    opened = open_model(folder)
    layers = {layer.index: layer for layer in opened.spec.layers}

    def unit(layer: int, expert: int, group: ProjectionGroup, precision: Precision) -> Sequence[QTensor]:
        weight = read_group(opened.source, layers[layer], group, [expert])
        return [pack(c) for c in rows_of(rtn(weight, precision)[0], len(MATRICES[group]))]

    original, ids = load_original(folder, dtype=torch.float32), torch.arange(1, 25)[None]
    trial = Trial(original, opened, {index: partial(unit, index) for index in layers}, outside=True)
    with torch.no_grad():
        before = original(input_ids=ids).logits
        for bits in (4, 6, 4):
            rest = {"attention": Precision(bits, 32), "lm_head": FULL, "shared_experts": Precision(8, 32, True)}
            precisions = PrecisionMap.uniform(opened.inventory.experts, Precision(4, 32), rest)
            if not (at := tmp_path / f"{bits}").exists():
                pack_model(opened, precisions, at, method="rtn")
            got = trial.take(precisions)(input_ids=ids).logits
            torch.testing.assert_close(got, load(at, dtype=torch.float32)(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(original(input_ids=ids).logits, before), "the original is as it was"


def divergence(kl: Sequence[float]) -> Divergence:
    counts = (10,) * len(kl)
    estimate = ratio_estimate(kl, counts)
    return Divergence(estimate, estimate, 10 * len(kl), "same", counts, tuple(kl), counts)


@pytest.mark.parametrize(
    ("difference", "kept"), [(-0.02, True), (-0.0005, False), (0.02, False)], ids=["better", "within", "worse"]
)
def test_the_guard_keeps_a_map_that_is_better_beyond_the_interval(
    difference: float, kept: bool, tiny_model: Make
) -> None:
    opened = open_model(tiny_model("olmoe"))
    options = BITS[:3]
    made = random_map(opened.inventory, mixed(opened, 0), 1)
    noise = [0.01 * (-1) ** i for i in range(16)]

    def judge(precisions: PrecisionMap) -> Divergence:
        own = precisions.experts == made.experts
        return divergence([0.1 + (difference + n if own else 0.0) for n in noise])

    found = guarded(made, opened, options, f"{opened.inventory.expert_bits(made)}bpw", judge)
    uniform = uniform_map(opened.inventory, options, f"{opened.inventory.expert_bits(made)}bpw", made.rest)
    assert found.precisions.experts == (made if kept else uniform).experts
    assert found.precisions.rest == made.rest
    assert ("better than uniform" in found.sentence) == kept
    assert "uniform 4g32, the largest that fits, " in found.sentence
    assert ("--no-guard" in found.sentence) != kept


def test_a_uniform_map_needs_no_comparison(tiny_model: Make) -> None:
    opened = open_model(tiny_model("olmoe"))
    made = uniform_map(opened.inventory, [BITS[1]])

    def judge(precisions: PrecisionMap) -> Divergence:
        raise AssertionError("not to be called")

    found = guarded(made, opened, BITS[:3], f"{opened.inventory.expert_bits(made)}bpw", judge)
    assert found.precisions == made
    assert found.sentence == "the map is uniform, 3g32 for every expert"


def test_spare_windows_are_not_those_of_the_comparison(tiny_model: Make) -> None:
    tokenizer = load_tokenizer(tiny_model("olmoe"))
    texts = ["".join(chr(33 + (i * i) % 90) for i in range(4000))]
    judged = text_windows(texts, tokenizer, 64, limit=8)
    spare = spare_windows(texts, tokenizer, 64, limit=8)
    assert len(spare) == 8
    assert not {tuple(w.ids.tolist()) for w in spare} & {tuple(w.ids.tolist()) for w in judged}
    with pytest.raises(DataError, match="have 0 windows of 64 tokens beside"):
        spare_windows(texts, tokenizer, 64, limit=100)


def test_a_budget_is_guarded_and_says_so(tiny_model: Make, tmp_path: Path, calibration: Calibration) -> None:
    """The weights are random and alike, so nothing is known that a uniform map does not have."""
    common: dict[str, Any] = {
        "budget": "3.6bpw", "options": BITS[:3], "calibration": calibration, "method": "rtn", "cost": "output_error",
    }  # fmt: skip
    folder = tiny_model("olmoe")
    packed = quantize(folder, tmp_path / "guarded", **common)
    assert "uniform 3g32" in packed.guard
    assert read_json(packed.path / "mopeq" / "run.json")["guard"] == packed.guard
    assert PrecisionMap.from_json(read_json(packed.path / "mopeq" / "precision.json")) == packed.precisions
    again = quantize(folder, tmp_path / "guarded", **common, resume=True)
    assert (again.guard, again.precisions.experts) == (packed.guard, packed.precisions.experts)
    better = quantize(folder, tmp_path / "refined", **common, refine=3)
    assert "of 3 exchanges taken, KL " in better.guard
    assert "uniform 3g32" in better.guard
    free = quantize(folder, tmp_path / "free", **common, guard=False)
    assert free.guard == ""
    assert free.precisions.note["method"] == "knapsack"


def test_without_enough_text_the_map_stays(tiny_model: Make, tmp_path: Path, calibration: Calibration) -> None:
    short = Calibration(calibration.data, samples=8, length=250, batch_size=4)
    packed = quantize(
        tiny_model("olmoe"), tmp_path / "out", budget="3.2bpw", options=BITS[:3], calibration=short, method="rtn"
    )
    assert "not compared with uniform precision: the data kept apart have 0 windows" in packed.guard
    assert packed.precisions.note["method"] == "knapsack"


def test_a_map_or_a_uniform_precision_has_nothing_to_guard(tiny_model: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"guard and exchanges .* are for a budget"):
        quantize(tiny_model("olmoe"), tmp_path / "out", uniform=BITS[0], method="rtn", guard=True)
