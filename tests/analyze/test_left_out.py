"""What leaving an expert out costs, against the layer run without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from measuring import batches, case

from mopeq.adapters import describe
from mopeq.analyze import analyze, here, layer_metrics, observe
from mopeq.analyze.forward import experts_module
from mopeq.errors import MapError
from mopeq.load import load_original
from mopeq.precision import LEFT_OUT, Precision
from mopeq.source import open_source
from mopeq.stats import cost_metric

Make = Callable[..., Path]
OPTIONS = (LEFT_OUT, Precision(4, 32))


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_costs_are_those_of_the_layer_without_the_expert(family: str, tiny_model: Make) -> None:
    source = open_source(tiny_model(family))
    spec, model = describe(source), load_original(tiny_model(family))
    data = batches((2, 20), (1, 15))
    routed = observe(model, spec, data, gradients=True, seed=3)
    names = ("output_error", "fisher_error")
    found = analyze(model, source, spec, data, names, options=OPTIONS, quantizer="rtn", routed=routed)
    for layer in spec.layers:
        seen, module = routed[layer.index], experts_module(model, layer)
        for expert in range(len(layer.experts)):
            weights = seen.weights.clone()
            for token in range(len(weights)):
                gone = seen.index[token] == expert
                whole = weights[token].sum()
                weights[token, gone] = 0
                weights[token] *= whole / weights[token].sum()
            with torch.no_grad():
                change = module(seen.hidden, seen.index, weights) - module(seen.hidden, seen.index, seen.weights)
            assert seen.gradient is not None
            for cost, weighted in (("output_error", change), ("fisher_error", change * seen.gradient)):
                wanted = float(weighted.double().square().sum()) / len(change)
                got = found.metric(cost_metric(cost, "gate_up", LEFT_OUT))[layer.index][expert]
                assert got == pytest.approx(wanted, rel=1e-3, abs=1e-9 if expert not in seen.index else 1e-7)
                assert found.metric(cost_metric(cost, "down", LEFT_OUT))[layer.index][expert] == 0


def test_a_slab_at_a_time_gives_the_same(tiny_model: Make) -> None:
    model, source, spec = case(tiny_model, "qwen3_moe")
    routed, layer = observe(model, spec, batches((2, 20))), spec.layers[1]
    module = experts_module(model, layer)
    whole, parts = (
        layer_metrics(
            source, layer, routed[layer.index], module, ("output_error",), options=OPTIONS, quantizer="rtn",
            memory=memory, across=here,
        )[0]
        for memory in (1 << 30, 1)
    )  # fmt: skip
    assert whole.keys() == parts.keys()
    for name, row in whole.items():
        assert parts[name] == pytest.approx(row, rel=1e-5)


def test_experts_that_weigh_their_input_are_refused(tiny_model: Make) -> None:
    model, source, spec = case(tiny_model, "llama4_text")
    with pytest.raises(MapError, match="0 bits is no option"):
        analyze(model, source, spec, batches((1, 9)), ["output_error"], options=OPTIONS, quantizer="rtn")
