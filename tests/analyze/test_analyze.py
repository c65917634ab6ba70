import json
from typing import Any

import pytest
import torch
from measuring import Make, batches, case

import mopeq.analyze as package
from mopeq.analyze import METRICS, analyze, observe
from mopeq.errors import DataError, MapError, ModelError
from mopeq.precision import Precision, parse_precision
from mopeq.stats import Stats, cost_options, cost_table

OPTIONS = [parse_precision(p) for p in ("4g32", "2g32", "4g32")]


def test_everything_at_once(tiny_model: Make) -> None:
    model, source, spec = case(tiny_model)
    data = batches((2, 8), (1, 10))
    stats = analyze(model, source, spec, data, list(METRICS), options=OPTIONS, probes=2, seed=5, info={"data": "noise"})
    scores = {"tokens", "frequency", "gate_mass", "gradient_norm", "inverse_norm", "fisher", "hessian_trace"}
    scores |= {"moment_trace.gate_up", "moment_trace.down", "output_peak"}
    errors = {"fisher.stderr", "hessian_trace.stderr"}
    assert {n for n in stats.metrics if "/" not in n} == scores | errors
    for cost in ("output_error", "fisher_error"):
        assert cost_options(stats, cost) == (Precision(2, 32), Precision(4, 32))
        table = cost_table(stats, cost)
        assert table.loss.shape == (32, 2)
        assert (table.loss[:, 0] >= table.loss[:, 1]).mean() > 0.9
    assert [sum(row) for row in stats.metrics["frequency"].values()] == pytest.approx([1, 1])
    assert [sum(row) for row in stats.metrics["tokens"].values()] == [52, 52]
    info = stats.info
    assert (info["data"], info["tokens"], info["sequences"], info["seed"]) == ("noise", 26, 3, 5)
    assert (info["quantizer"], info["options"], info["hessian_trace_probes"]) == ("gptq", ["2g32", "4g32"], 2)
    assert set(info["seconds"]) == {
        "inverse_norm", "observe", "fisher", "hessian_trace", "output_error, fisher_error",
    }  # fmt: skip
    assert Stats.from_json(json.loads(json.dumps(stats.to_json()))).model == stats.model


def test_the_model_runs_only_where_it_is_needed_and_once(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, source, spec = case(tiny_model)
    data, passes = batches((1, 8)), []

    def counted(*args: Any, **options: Any) -> Any:
        passes.append(options["gradients"])
        return observe(*args, **options)

    monkeypatch.setattr(package, "observe", counted)
    assert set(analyze(None, source, spec, [], ["inverse_norm"]).metrics) == {"inverse_norm"}
    assert passes == []
    analyze(model, source, spec, data, ["frequency", "gate_mass", "output_error"], options=OPTIONS)
    assert passes == [False]
    analyze(model, source, spec, data, ["frequency", "output_error", "fisher_error"], options=OPTIONS)
    assert passes == [False, True]
    for metric in ("fisher", "hessian_trace"):  # the pass says which experts saw too little
        assert "starved" in analyze(model, source, spec, batches((2, 8)), [metric], probes=2).info
    assert passes == [False, True, False, False]


def test_an_observation_is_used_again(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, source, spec = case(tiny_model)
    data = batches((1, 9))
    routed = observe(model, spec, data, gradients=True)
    wanted = analyze(model, source, spec, data, ["fisher_error"], options=OPTIONS, quantizer="rtn")
    monkeypatch.setattr(package, "observe", None)
    found = analyze(model, source, spec, data, ["fisher_error"], options=OPTIONS, quantizer="rtn", routed=routed)
    assert found.metrics == wanted.metrics
    monkeypatch.undo()
    without = observe(model, spec, data)
    again = analyze(model, source, spec, data, ["fisher_error"], options=OPTIONS, quantizer="rtn", routed=without)
    assert again.metrics == wanted.metrics
    assert "observe" in again.info["seconds"]


def test_experts_with_few_tokens_are_named(tiny_model: Make) -> None:
    model, source, spec = case(tiny_model)
    stats = analyze(model, source, spec, batches((1, 3)), ["output_error"], options=OPTIONS[:1], minimum_tokens=2)
    tokens = stats.metrics["tokens"]
    wanted = {f"{layer}.{e}": n for layer, row in tokens.items() for e, n in enumerate(row) if n < 2}
    assert stats.info["starved"] == wanted
    assert list(stats.info["starved"].values()) == sorted(wanted.values())
    unused = [name for name, n in wanted.items() if n == 0]
    assert len(unused) >= 4
    for name in unused:
        layer, e = map(int, name.split("."))
        assert stats.metrics["output_error/down/4g32"][layer][e] == 0
    assert stats.info["minimum_tokens"] == 2
    default = analyze(model, source, spec, batches((1, 3)), ["frequency"])
    assert default.info["minimum_tokens"] == 16
    assert len(default.info["starved"]) == 16


def test_images_are_counted_apart(tiny_model: Make) -> None:
    model, source, spec = case(tiny_model, "qwen3_vl_moe")
    data = batches((1, 10))
    data[0]["modality"] = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0, 0]])
    metrics = analyze(model, source, spec, data, ["frequency", "gate_mass"]).metrics
    for layer in metrics["tokens"]:
        assert sum(metrics["tokens.vision"][layer]) == 8
        assert sum(metrics["tokens.text"][layer]) == 12
        assert sum(metrics["frequency.vision"][layer]) == pytest.approx(1)
    assert {"gate_mass.vision", "gate_mass.text", "frequency.text"} <= set(metrics)


def test_refusals(tiny_model: Make) -> None:
    model, source, spec = case(tiny_model)
    data = batches((1, 4))
    with pytest.raises(MapError, match=r"unknown metric 'fischer'; expected one of frequency, .*did you mean fisher\?"):
        analyze(model, source, spec, data, ["fischer"])
    with pytest.raises(MapError, match="no metric asked for"):
        analyze(model, source, spec, data, [])
    with pytest.raises(MapError, match=r"unknown quantizer 'gtpq'.*did you mean gptq\?"):
        analyze(model, source, spec, data, ["output_error"], options=OPTIONS, quantizer="gtpq")
    with pytest.raises(MapError, match="output_error without precisions"):
        analyze(model, source, spec, data, ["output_error"])
    with pytest.raises(MapError, match="groups of 128 do not fit rows of 64"):
        analyze(model, source, spec, data, ["fisher_error"], options=[Precision(4, 128)])
    with pytest.raises(DataError, match="no calibration tokens"):
        analyze(model, source, spec, [], ["frequency"])
    with pytest.raises(DataError, match="fisher runs the model over calibration data"):
        analyze(None, source, spec, data, ["fisher"])
    with torch.no_grad():
        model.model.layers[1].mlp.experts.gate_up_proj[0, 0, 0] = torch.nan
        model.model.layers[1].mlp.gate.weight[0] = 9.0  # every token goes to expert 0
    with pytest.raises(ModelError, match="layer 1: NaN or infinite values leave"):
        analyze(model, source, spec, batches((4, 20)), ["frequency"])
