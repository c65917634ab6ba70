"""The whole path on tiny models of every family: quantize, pack, load, run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mopeq.checkpoint import read_manifest, verify
from mopeq.errors import InputError, MapError, OutputError
from mopeq.load import load, load_original, load_tokenizer
from mopeq.measure import Calibration, observed, open_model, split_texts
from mopeq.precision import FULL, GROUPS, Precision, PrecisionMap
from mopeq.quantize import pack_model, quantize
from mopeq.stats import Stats, cost_options, read_json
from tiny import FAMILIES

Make = Callable[..., Path]
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 60


@pytest.fixture
def calibration(tmp_path: Path) -> Calibration:
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{i}: {TEXT}"}) for i in range(12)))
    return Calibration(str(path), samples=8, length=64, batch_size=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_quantized_and_runs(family: str, tiny_model: Make, tmp_path: Path) -> None:
    folder = tiny_model(family)
    packed = quantize(folder, tmp_path / "out", uniform=Precision(8, 32), method="rtn", evaluated=False)
    verify(packed.path)
    small, original = load(packed.path, dtype=torch.float32), load_original(folder, dtype=torch.float32)
    ids = torch.arange(1, 25)[None]
    with torch.no_grad():
        got, want = small(input_ids=ids).logits, original(input_ids=ids).logits
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert error.median() < 0.05, "8 bits change the logits by about a per cent, save where a routing choice flips"
    assert packed.bytes < 0.45 * packed.original_bytes


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "llama4_text", "deepseek_v3"])
def test_a_budget_is_kept_and_everything_is_left_behind(
    family: str, tiny_model: Make, tmp_path: Path, calibration: Calibration
) -> None:
    packed = quantize(
        tiny_model(family),
        tmp_path / "out",
        budget="3.2bpw",
        calibration=calibration,
        options=[Precision(2, 32), Precision(4, 32)],
        command="mopeq quantize somewhere",
    )
    manifest = verify(packed.path)
    assert manifest.inventory.expert_bits(manifest.precisions) <= 3.2
    assert {p.bits for p in manifest.precisions.histogram()} == {2, 4}
    inner = packed.path / "mopeq"
    stats = Stats.from_json(read_json(inner / "stats.json"))
    assert cost_options(stats, "fisher_error") == (Precision(2, 32), Precision(4, 32))
    assert PrecisionMap.from_json(read_json(inner / "precision.json")) == packed.precisions
    assert read_json(inner / "run.json")["commands"] == ["mopeq quantize somewhere"]
    kl = read_json(inner / "evaluation.json")["divergence"]["kl"]["value"]
    assert packed.evaluation is not None
    assert kl == packed.evaluation.divergence.kl.value > 0


@pytest.mark.parametrize(("method", "cost"), [("hqq", "output_error"), ("signround", "fisher_error")])
def test_other_quantizers_are_measured_and_packed(
    method: str, cost: str, tiny_model: Make, tmp_path: Path, calibration: Calibration
) -> None:
    options = [Precision(2, 32), Precision(4, 32)]
    how = {"calibration": calibration, "method": method, "evaluated": False}
    packed = quantize(tiny_model("olmoe"), tmp_path / "out", budget="3.2bpw", options=options, cost=cost, **how)
    assert set(verify(packed.path).precisions.histogram()) == set(options)
    assert read_json(packed.path / "mopeq" / "run.json")["method"] == method


def test_a_budget_in_bytes_bounds_the_files(tiny_model: Make, tmp_path: Path, calibration: Calibration) -> None:
    folder = tiny_model("olmoe", dtype=torch.bfloat16)
    limits = {"calibration": calibration, "evaluated": False, "method": "rtn"}
    budget = 280_000
    packed = quantize(folder, tmp_path / "out", budget=f"{budget}B", **limits)
    files = sum(path.stat().st_size for path in packed.path.glob("*.safetensors"))
    assert files == packed.bytes <= budget
    assert files > 0.8 * budget, "the budget is used, up to one step and the bound on headers"


def test_bytes_are_predicted(tiny_model: Make, tmp_path: Path) -> None:
    packed = quantize(tiny_model("mixtral"), tmp_path / "out", uniform=Precision(3, 32), method="rtn", evaluated=False)
    inventory = packed.inventory
    tensors = inventory.total_bytes(packed.precisions) - inventory.header_bytes
    assert tensors <= packed.bytes <= tensors + inventory.header_bytes


def test_gptq_uses_the_calibration_text(tiny_model: Make, tmp_path: Path, calibration: Calibration) -> None:
    """GPTQ changes the output on calibration text less than rounding does: moments reach the right units."""
    folder, found = tiny_model("olmoe"), {}
    original = load_original(folder, dtype=torch.float32)
    texts, _ = split_texts(calibration, folder)
    ids = load_tokenizer(folder)(texts[0], return_tensors="pt").input_ids[:, :256]
    for method in ("rtn-mse", "gptq"):
        packed = quantize(
            folder,
            tmp_path / method,
            uniform=Precision(2, 32),
            method=method,
            calibration=calibration,
            rest={"attention": FULL, "lm_head": FULL},
            evaluated=False,
        )
        with torch.no_grad():
            change = load(packed.path, dtype=torch.float32)(input_ids=ids).logits - original(input_ids=ids).logits
        found[method] = float(change.square().mean())
    assert found["gptq"] < 0.8 * found["rtn-mse"]


def test_full_precision_units_stay_as_they_were(tiny_model: Make, tmp_path: Path) -> None:
    folder = tiny_model("olmoe", dtype=torch.bfloat16)
    rest = dict.fromkeys(("attention", "lm_head"), FULL)
    packed = quantize(folder, tmp_path / "out", uniform=FULL, rest=rest, method="rtn", evaluated=False)
    ids = torch.arange(1, 25)[None]
    with torch.no_grad():
        got = load(packed.path, dtype=torch.float32)(input_ids=ids).logits
        want = load_original(folder, dtype=torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_the_same_command_gives_the_same_bytes(tiny_model: Make, tmp_path: Path, calibration: Calibration) -> None:
    folder = tiny_model("qwen3_moe")
    made = [
        quantize(folder, tmp_path / name, budget="3.4bpw", calibration=calibration, evaluated=False).path
        for name in "ab"
    ]
    first, second = (sorted(path.glob("*.safetensors")) for path in made)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_experts_without_tokens_are_quantized_and_named(
    tiny_model: Make, tmp_path: Path, calibration: Calibration
) -> None:
    prepared = observed(
        open_model(tiny_model("olmoe")), Calibration(calibration.data, samples=1, length=8, batch_size=1)
    )
    precisions = PrecisionMap.uniform(prepared.inventory.experts, Precision(2, 32))
    packed = pack_model(prepared, precisions, tmp_path / "out")
    seen = {layer: set(routed.index.flatten().tolist()) for layer, routed in prepared.routed.items()}
    unseen = {f"{layer}.{e}.{g}" for layer in seen for e in set(range(8)) - seen[layer] for g in GROUPS}
    assert unseen
    assert unseen <= set(packed.fallbacks)
    manifest = read_manifest(packed.path)
    assert manifest.precisions.layers == prepared.inventory.experts


def test_refusals(tiny_model: Make, tmp_path: Path) -> None:
    folder = tiny_model("olmoe")
    with pytest.raises(InputError, match="give one of a precision map, a uniform precision and a budget"):
        quantize(folder, tmp_path / "out")
    with pytest.raises(InputError, match="no quantizer 'magic'; there are rtn, rtn-mse, hqq, gptq, signround"):
        quantize(folder, tmp_path / "out", uniform=Precision(4), method="magic")
    for given in ({"uniform": Precision(4)}, {"budget": "3bpw", "uniform_layers": True}):
        with pytest.raises(InputError, match="not with uniform layers"):
            quantize(folder, tmp_path / "out", refine=2, **given)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(OutputError, match="exists already; give a new folder"):
        quantize(folder, tmp_path / "full", uniform=Precision(4), method="rtn")
    with pytest.raises(MapError, match="use group size 32 or 64"):
        quantize(folder, tmp_path / "out", uniform=Precision(4, 128), method="rtn", evaluated=False)
    other = PrecisionMap.uniform({0: 4}, Precision(4, 32))
    with pytest.raises(MapError, match="for another model"):
        quantize(folder, tmp_path / "out", precisions=other, method="rtn", evaluated=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]
