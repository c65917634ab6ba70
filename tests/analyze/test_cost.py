from dataclasses import replace
from typing import Any

import pytest
import torch
from measuring import Case, Make, batches, case
from torch import Tensor

from mopeq.analyze.cost import layer_costs, quantized
from mopeq.analyze.moments import Moments, moments
from mopeq.analyze.observe import Routed, observe
from mopeq.errors import DataError
from mopeq.precision import GROUPS, Precision, ProjectionGroup, parse_precision
from mopeq.quantizers import QUANTIZERS, fallback_moments, moment_error, rtn
from mopeq.source import read_group
from mopeq.stats import cost_metric

OPTIONS = tuple(map(parse_precision, ("2g32", "4g32", "16")))
Weights = dict[ProjectionGroup, Tensor]


def prepared(found: Case, *shapes: tuple[int, int]) -> tuple[Any, Weights, Routed, Moments]:
    """The first MoE layer: module, weights, what it saw, moments."""
    layer = found.spec.layers[0]
    seen = observe(found.model, found.spec, batches(*shapes), gradients=True)[layer.index]
    module = found.model.get_submodule(layer.module)
    weights: Weights = {group: read_group(found.source, layer, group) for group in GROUPS}
    return module, weights, seen, moments(seen, module, weights["gate_up"])


def put(module: Any, expert: int, group: ProjectionGroup, canonical: Tensor) -> None:
    """Write a canonical matrix (rows, in) into a module's own layout."""
    own = module.gate_up_proj if group == "gate_up" else module.down_proj
    if getattr(module, "is_transposed", type(module).__name__.startswith("Llama4")):
        canonical = canonical.T
        if not getattr(module, "is_concatenated", True) and group == "gate_up":
            gate, up = canonical.chunk(2, dim=-1)
            canonical = torch.stack((gate, up), -1).flatten(-2)
    own.data[expert] = canonical


def run(module: Any, seen: Routed) -> Tensor:
    """The layer's output (tokens, H) from its recorded inputs, by the module itself."""
    if not seen.weighs_input:
        return module(seen.hidden, seen.index, seen.weights)  # type: ignore[no-any-return]
    c = torch.zeros(len(seen.hidden), module.num_experts).scatter_(1, seen.index, seen.weights)
    out = module((seen.hidden[None] * c.T[..., None]).flatten(0, 1))
    return out.view(module.num_experts, *seen.hidden.shape).sum(0)  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize("name", ["gptq", "rtn"])
def test_costs_are_the_changes_that_the_module_itself_shows(tiny_model: Make, family: str, name: str) -> None:
    module, weights, seen, summed = prepared(case(tiny_model, family), (3, 14))
    quantizer = QUANTIZERS[name]
    found = layer_costs(seen, module, weights, summed, OPTIONS, quantizer, minimum_tokens=9)
    assert seen.gradient is not None
    with torch.no_grad():
        before = run(module, seen)
        for group in GROUPS:
            inputs = fallback_moments(getattr(summed, group), summed.tokens, 9)[0]
            for precision in OPTIONS:
                left = quantized(weights[group], precision, quantizer, inputs)
                for e in (0, len(left) - 1):
                    put(module, e, group, left[e])
                    change = (run(module, seen) - before).double()
                    put(module, e, group, weights[group][e])
                    output = float(change.square().sum()) / 42
                    fisher = float((change * seen.gradient).square().sum()) / 42
                    for cost, wanted in (("output_error", output), ("fisher_error", fisher)):
                        value = found[cost_metric(cost, group, precision)][e]
                        assert value == pytest.approx(wanted, rel=2e-3, abs=1e-9)


def test_down_agrees_with_the_closed_form_of_its_moments(tiny_model: Make) -> None:
    module, weights, seen, summed = prepared(case(tiny_model), (2, 15))
    found = layer_costs(seen, module, weights, None, OPTIONS[:1], rtn, costs=("output_error",))
    wanted = moment_error(weights["down"], rtn(weights["down"], OPTIONS[0]), summed.down) / 30
    assert list(found) == ["output_error/gate_up/2g32", "output_error/down/2g32"]
    assert found["output_error/down/2g32"] == pytest.approx(wanted.tolist(), rel=1e-4)


def test_memory_and_chunks_do_not_matter(tiny_model: Make) -> None:
    module, weights, seen, summed = prepared(case(tiny_model), (2, 15))
    whole = layer_costs(seen, module, weights, summed, OPTIONS, QUANTIZERS["gptq"])
    parts = layer_costs(seen, module, weights, summed, OPTIONS, QUANTIZERS["gptq"], memory=1, chunk=2)
    assert set(whole) == {
        cost_metric(c, g, p) for c in ("output_error", "fisher_error") for g in GROUPS for p in OPTIONS
    }
    for name, row in whole.items():
        assert row == pytest.approx(parts[name], rel=1e-3, abs=1e-12)


def test_gradients_of_one_make_the_two_costs_equal(tiny_model: Make) -> None:
    module, weights, seen, summed = prepared(case(tiny_model), (1, 20))
    ones = replace(seen, gradient=torch.ones_like(seen.hidden))
    found = layer_costs(ones, module, weights, summed, OPTIONS[:2], QUANTIZERS["gptq"])
    for group in GROUPS:
        for p in OPTIONS[:2]:
            both = [found[cost_metric(c, group, p)] for c in ("output_error", "fisher_error")]
            assert both[0] == pytest.approx(both[1], rel=1e-6)
            assert min(v for v, n in zip(both[0], summed.tokens.tolist(), strict=True) if n) > 0


def test_more_bits_cost_less_and_unused_experts_nothing(tiny_model: Make) -> None:
    module, weights, seen, _ = prepared(case(tiny_model), (2, 20))
    seen.index[seen.index == 2] = -1
    summed = moments(seen, module, weights["gate_up"])
    options = [Precision(b, 32) for b in (2, 3, 4, 6, 8)]
    found = layer_costs(seen, module, weights, summed, options, QUANTIZERS["gptq"])
    for cost in ("output_error", "fisher_error"):
        for group in GROUPS:
            rows = [found[cost_metric(cost, group, p)] for p in options]
            assert [row[2] for row in rows] == [0.0] * 5
            totals = [sum(row) for row in rows]
            assert totals == sorted(totals, reverse=True)
            assert totals[-1] < totals[0] / 100


def test_bfloat16_weights_lose_nothing_at_16_bits(tiny_model: Make) -> None:
    module, weights, seen, summed = prepared(case(tiny_model, dtype=torch.bfloat16), (1, 12))
    found = layer_costs(seen, module, weights, summed, OPTIONS[2:], QUANTIZERS["gptq"])
    assert all(v == 0 for row in found.values() for v in row)


def test_gradients_are_asked_for(tiny_model: Make) -> None:
    module, weights, seen, summed = prepared(case(tiny_model), (1, 6))
    bare = replace(seen, gradient=None)
    with pytest.raises(DataError, match="fisher_error needs gradients"):
        layer_costs(bare, module, weights, summed, OPTIONS, rtn)
    assert len(layer_costs(bare, module, weights, summed, OPTIONS, rtn, costs=("output_error",))) == 6
