"""Text and image tokens measured apart, and weighted against each other."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from measuring import Make, batches, case

from mopeq.analyze import GRADIENTS, WEIGHTED, analyze, fisher, layer_costs, moments, observe
from mopeq.analyze.activation import gradient_norm
from mopeq.analyze.observe import Routed, expert_rows
from mopeq.data.samples import bundled_images, bundled_vlm
from mopeq.errors import DataError, InputError, OutputError
from mopeq.measure import Calibration, measure, measure_prepared, observed, open_model, token_weights
from mopeq.precision import GROUPS, parse_precision
from mopeq.quantize import quantize
from mopeq.quantizers import QUANTIZERS
from mopeq.seam import activate
from mopeq.source import read_group

OPTIONS = [parse_precision("3g32")]
FAMILIES = pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "llama4_text"])


def mixed(found: Any, *shapes: tuple[int, int]) -> list[dict[str, Any]]:
    """Batches whose tokens 2 to 5 are called image tokens."""
    data = batches(*shapes)
    for batch in data:
        batch["modality"] = torch.zeros_like(batch["input_ids"])
        batch["modality"][:, 2:6] = 1
    return data


def repeated(seen: Routed, times: torch.Tensor) -> Routed:
    """Every token as many times as it counts."""
    assert seen.gradient is not None
    parts = {name: getattr(seen, name).repeat_interleave(times, 0) for name in ("hidden", "index", "weights")}
    return replace(seen, **parts, gradient=seen.gradient.repeat_interleave(times, 0), vision=None, token_weight=None)


@FAMILIES
def test_a_token_that_counts_three_is_three_tokens(tiny_model: Make, family: str) -> None:
    found = case(tiny_model, family)
    layer = found.spec.layers[0]
    module = found.model.get_submodule(layer.module)
    weights = {group: read_group(found.source, layer, group) for group in GROUPS}
    seen = observe(found.model, found.spec, mixed(found, (2, 9)), gradients=True)[layer.index]
    assert seen.vision is not None
    times = torch.where(seen.vision, 1, 3)
    weighted, explicit = replace(seen, token_weight=times.float()), repeated(seen, times)
    got, want = (moments(one, module, weights["gate_up"]) for one in (weighted, explicit))
    for group in GROUPS:
        torch.testing.assert_close(getattr(got, group), getattr(want, group), rtol=1e-4, atol=1e-5)
    costs, tripled = (
        layer_costs(one, module, weights, got, OPTIONS, QUANTIZERS["gptq"], minimum_tokens=0)
        for one in (weighted, explicit)
    )
    for name, row in tripled.items():
        assert [v * 18 for v in costs[name]] == pytest.approx([v * int(times.sum()) for v in row], rel=1e-5)


@FAMILIES
def test_kinds_are_what_their_tokens_alone_give_and_add_up(tiny_model: Make, family: str) -> None:
    model, source, spec = case(tiny_model, family)
    data = mixed(model, (2, 9))
    stats = analyze(model, source, spec, data, [*GRADIENTS, *WEIGHTED], options=OPTIONS, minimum_tokens=0)
    layer = spec.layers[-1]
    module, seen = model.get_submodule(layer.module), observe(model, spec, data, gradients=True)[layer.index]
    weights = {group: read_group(source, layer, group) for group in GROUPS}
    summed = moments(seen, module, weights["gate_up"])
    assert seen.vision is not None
    for kind, rows in ((".vision", seen.vision), (".text", ~seen.vision)):
        alone = replace(seen.only(rows), vision=None)
        for name, row in layer_costs(
            alone, module, weights, summed, OPTIONS, QUANTIZERS["gptq"], minimum_tokens=0
        ).items():
            cost, _, rest = name.partition("/")
            assert stats.metrics[f"{cost}{kind}/{rest}"][layer.index] == pytest.approx(row, rel=1e-4, abs=1e-12)
        both = moments(alone, module, weights["gate_up"])
        for group in GROUPS:
            traces = getattr(both, group).diagonal(dim1=1, dim2=2).sum(1) / 18
            assert stats.metrics[f"moment_trace.{group}{kind}"][layer.index] == pytest.approx(
                traces.tolist(), rel=1e-4, abs=1e-9
            )
    for name in [n for n in stats.metrics if ".vision" in n and n.split(".")[0] not in ("frequency", "gradient_norm")]:
        vision, text, both = (
            stats.metrics[name.replace(".vision", to)][layer.index] for to in (".vision", ".text", "")
        )
        assert both == pytest.approx([a + b for a, b in zip(vision, text, strict=True)], rel=1e-5)


def test_gradient_norm_by_hand() -> None:
    seen = Routed(
        hidden=torch.zeros(3, 2),
        index=torch.tensor([[0, 1], [1, -1], [2, 1]]),
        weights=torch.ones(3, 2),
        weighs_input=False,
        gradient=torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]]),
        vision=torch.tensor([True, False, False]),
    )
    assert gradient_norm(seen, 4).tolist() == [5, 16 / 3, 10, 0]
    assert gradient_norm(seen, 4, ~seen.vision).tolist() == [0, 5.5, 10, 0]
    with pytest.raises(DataError, match="gradient_norm needs gradients"):
        gradient_norm(replace(seen, gradient=None), 4)


@FAMILIES
@pytest.mark.parametrize("kind", ["", "vision", "text"])
def test_fisher_of_one_kind_is_that_of_its_recorded_tokens(tiny_model: Make, family: str, kind: str) -> None:
    """The squared gradients, taken again from the inputs and output gradients that observing recorded."""
    model, source, spec = case(tiny_model, family)
    data = mixed(model, (1, 9), (1, 9))
    found, _ = fisher(model, spec, data, seed=3, kind=kind)
    routed = observe(model, spec, data, gradients=True, seed=3)
    for layer in spec.layers:
        seen, module = routed[layer.index], model.get_submodule(layer.module)
        assert seen.vision is not None
        assert seen.gradient is not None
        rows = {"": torch.ones_like(seen.vision), "vision": seen.vision, "text": ~seen.vision}[kind]
        total = torch.zeros(len(layer.experts))
        for sequence in (slice(0, 9), slice(9, 18)):
            inside = torch.zeros_like(rows)
            inside[sequence] = True
            for e, (r, c) in enumerate(expert_rows(seen.only(rows & inside), len(layer.experts))):
                w = [read_group(source, layer, group, [e])[0].requires_grad_() for group in GROUPS]
                c = c[:, None]
                x, after = (seen.hidden[r] * c, torch.ones_like(c)) if seen.weighs_input else (seen.hidden[r], c)
                out = activate(module, x @ w[0].T, e) @ w[1].T * after
                (out * seen.gradient[r]).sum().backward()
                total[e] += sum(float(one.grad.square().sum()) for one in w if one.grad is not None) / 18
        assert found[layer.index] == pytest.approx(total.tolist(), rel=2e-3, abs=1e-9)


def test_weights_are_one_on_average_and_only_of_images() -> None:
    data = mixed(None, (2, 8))
    data[0]["attention_mask"][0, :2] = 0  # 8 image tokens and 6 others
    (made,) = token_weights(data, 22.0)
    kept = made["token_weight"][data[0]["attention_mask"].bool()]
    assert kept.mean().item() == pytest.approx(1)
    assert kept.max().item() / kept.min().item() == pytest.approx(22)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(DataError, match=r"modality weight .*expected a number above 0"):
            token_weights(data, wrong)
    with pytest.raises(DataError, match="0 of the 16 calibration tokens are image tokens"):
        token_weights(batches((2, 8)), 22.0)


def conversations(weight: float) -> Calibration:
    return Calibration(str(bundled_images("calibration.jsonl")), samples=6, batch_size=2, modality_weight=weight)


def test_layer_by_layer_and_whole_agree_and_the_weight_is_heard() -> None:
    names, options = ("fisher_error", "moment_trace", "gradient_norm"), [parse_precision("3g32")]
    found = measure(bundled_vlm(), names, calibration=conversations(22.0), options=options)
    whole = observed(open_model(bundled_vlm()), conversations(22.0))
    wanted = measure_prepared(whole, names, options=options)
    plain = measure(bundled_vlm(), names, calibration=conversations(1.0), options=options)
    assert set(found.metrics) == set(wanted.metrics) == set(plain.metrics)
    assert (found.info["modality_weight"], "modality_weight" in plain.info) == (22.0, False)
    for name, rows in found.metrics.items():
        flat = [v for row in rows.values() for v in row]
        assert flat == pytest.approx([v for row in wanted.metrics[name].values() for v in row], rel=2e-2, abs=1e-7)
    for name in ("moment_trace.down", "fisher_error/down/3g32"):
        ours, unweighted = (sum(sum(row) for row in s.metrics[name].values()) for s in (found, plain))
        assert ours != pytest.approx(unweighted, rel=1e-3)
    for layer, row in found.metrics["moment_trace.gate_up"].items():  # the weighted sum of the two kinds
        text, vision = (found.metrics[f"moment_trace.gate_up.{kind}"][layer] for kind in ("text", "vision"))
        tokens = {kind: sum(found.metrics[f"tokens.{kind}"][layer]) for kind in ("text", "vision")}
        mean = (22 * tokens["text"] + tokens["vision"]) / sum(tokens.values())
        assert row == pytest.approx([(22 * t + v) / mean for t, v in zip(text, vision, strict=True)], rel=1e-4)


def test_the_weight_is_part_of_the_job_and_refused_where_it_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(weight: float, resume: bool) -> None:
        options = [parse_precision("3g32"), parse_precision("4g32")]
        quantize(bundled_vlm(), tmp_path / "out", budget="4bpw", options=options, calibration=conversations(weight),
                 evaluated=False, resume=resume)  # fmt: skip

    def stop(*given: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["mopeq.quantize"], "write_packed", stop)
        with pytest.raises(KeyboardInterrupt):
            run(22.0, False)
    with pytest.raises(OutputError, match="was begun with calibration"):
        run(5.0, True)
    run(22.0, True)
    with pytest.raises(InputError, match="does not enter rtn with a map"):
        quantize(
            bundled_vlm(),
            tmp_path / "x",
            uniform=parse_precision("4g32"),
            method="rtn",
            calibration=conversations(2.0),
            evaluated=False,
        )
    with pytest.raises(InputError, match="a modality weight enters output_error, fisher_error, moment_trace"):
        measure(bundled_vlm(), ("frequency",), calibration=conversations(2.0))
    with pytest.raises(DataError, match=r"0 of the .* calibration tokens are image tokens"):
        measure(bundled_vlm(), ("moment_trace",), calibration=Calibration(samples=2, length=64, modality_weight=2.0))
