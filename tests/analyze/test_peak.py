"""Peaks of experts' outputs against the model's own experts, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from measuring import batches, case

import tiny
from mopeq.adapters import describe
from mopeq.analyze import analyze, observe, output_peaks
from mopeq.analyze.forward import experts_module
from mopeq.analyze.observe import expert_rows
from mopeq.cli import main
from mopeq.load import load_original
from mopeq.precision import GROUPS
from mopeq.source import open_source, read_group
from mopeq.stats import Stats, read_json

Make = Callable[..., Path]


def test_peaks_are_those_of_the_models_own_experts(tiny_model: Make) -> None:
    model, source, spec = case(tiny_model, "qwen3_moe")
    data = batches((3, 20), (2, 12))
    routed = observe(model, spec, data)
    found = analyze(model, source, spec, data, ["output_peak"], routed=routed).metric("output_peak")
    for layer in spec.layers:
        seen, module = routed[layer.index], experts_module(model, layer)
        for expert, (rows, _) in enumerate(expert_rows(seen, len(layer.experts))):
            x = seen.hidden[rows]
            with torch.no_grad():
                put = module(x, torch.full((len(x), 1), expert), torch.ones(len(x), 1))
            assert found[layer.index][expert] == pytest.approx(float(put.abs().max()) if len(x) else 0.0, rel=1e-5)
        weights = {group: read_group(source, layer, group, (2, 1)) for group in GROUPS}
        some = output_peaks(seen, module, weights["gate_up"], weights["down"], (2, 1), chunk=3)
        assert some == pytest.approx([found[layer.index][2], found[layer.index][1]], rel=1e-5)


def test_a_planted_super_expert_is_named_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.save_tiny("olmoe", tmp_path / "model")
    name = next(e for e in describe(open_source(folder)).experts() if str(e.id) == "1.5").down.key
    tiny.rewrite(folder, {name: 100 * tiny.tensors(folder)[name]})
    assert torch.isfinite(load_original(folder)(torch.arange(9)[None]).logits).all()
    monkeypatch.chdir(tmp_path)
    calibration = ["--samples", "4", "--length", "64", "--group-size", "32"]
    assert main(["analyze", str(folder), *calibration, "--levels", "2,4"]) == 0
    assert "1 super-expert by the peak of their output: 1.5 (" in capsys.readouterr().out
    assert main(["allocate", "stats.json", "--budget", "3.0bpw"]) == 0
    assert "super-experts at the most bits on offer: 1.5" in capsys.readouterr().out
    assert read_json("precision.json")["note"]["super_experts"] == ["1.5"]
    assert main(["allocate", "stats.json", "--budget", "3.0bpw", "--no-protect"]) == 0
    assert "super_experts" not in read_json("precision.json")["note"]
    assert Stats.from_json(read_json("stats.json")).metric("output_peak")[1][5] > 0
    assert main(["allocate", "stats.json", "--method", "kmeans", "--score", "frequency", "--no-protect"]) == 2
    assert "--no-protect does not apply here" in capsys.readouterr().err
