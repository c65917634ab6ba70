"""Routers fitted to the original's: the loss against a textbook, what changes in a folder, and what does not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import packing
from mopeq import align as align_module
from mopeq.align import ALIGNED, Alignment, align, aligned, fitted, likeliest, router_loss, stored_keys
from mopeq.analyze import observe
from mopeq.checkpoint import restored, verify, with_tensors
from mopeq.cli import main
from mopeq.data.samples import bundled_images, bundled_model, bundled_text, bundled_vlm
from mopeq.data.text import read_texts, text_windows, window_batches
from mopeq.errors import CheckpointError, InputError, ModelError
from mopeq.evaluate import Estimate, divergence
from mopeq.load import load, load_original, load_tokenizer
from mopeq.measure import Calibration, calibrated, open_model
from mopeq.precision import DEFAULT_REST, Precision, PrecisionMap
from mopeq.qtensor import dequantize
from mopeq.quantize import quantize
from mopeq.quantizers import rtn
from mopeq.stats import read_json

Make = Callable[..., Path]
IDS = torch.randint(0, 250, (2, 13), generator=torch.Generator().manual_seed(3))
BATCHES = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
FAMILIES = ["olmoe", "mixtral", "gpt_oss", "deepseek_v3", "granitemoe", "llama4", "deepseek_vl_v2", "kimi_k25", "molmo"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def textbook_loss(made: list[float], original: list[float], top_k: int) -> float:
    """KL of one token over the m likeliest experts of the original, number by number."""
    count = top_k + (len(original) - top_k) // 2
    order = sorted(range(len(original)), key=lambda e: -original[e])[:count]
    p_sum, q_sum = (sum(math.exp(row[e]) for e in order) for row in (original, made))
    total = 0.0
    for e in order:
        p, q = math.exp(original[e]) / p_sum, math.exp(made[e]) / q_sum
        total += p * math.log(p / q)
    return total


@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (8, 2), (9, 4), (6, 6)])
def test_the_loss_is_the_textbooks(experts: int, top_k: int) -> None:
    original, made = normal(5, experts), normal(5, experts, seed=1)
    got = router_loss(made, *likeliest(original, top_k))
    want = [textbook_loss(a, b, top_k) for a, b in zip(made.tolist(), original.tolist(), strict=True)]
    assert float(got) == pytest.approx(sum(want) / 5, rel=1e-5)
    assert float(router_loss(original, *likeliest(original, top_k))) == pytest.approx(0, abs=1e-6)


def test_fitting_finds_a_router_that_was_turned() -> None:
    weight, bias, hidden = normal(8, 16), normal(8, seed=1), normal(400, 16, seed=2)
    turn = torch.linalg.qr(normal(16, 16, seed=3) * 0.1 + torch.eye(16))[0]
    wanted = likeliest(hidden @ weight.T + bias, 2)
    at = hidden @ turn
    made = fitted(weight, bias, at, *wanted, steps=300)
    losses = [float(router_loss(at @ w.T + bias, *wanted)) for w in (weight, made, weight @ turn)]
    assert losses[2] < 1e-9 < losses[1] < 0.2 * losses[0]
    assert torch.equal(fitted(weight, bias, at, *wanted, steps=0), weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_and_norms_are_found_in_files_and_are_linear(family: str, tiny_model: Make, tmp_path: Path) -> None:
    folder = tiny_model(family, dtype=torch.bfloat16)
    packing.pack_model(folder, tmp_path / "packed")
    opened, model = open_model(folder), load(tmp_path / "packed", dtype=torch.bfloat16)
    how = Alignment(tune=0.0 if family == "molmo" else 1e-4)
    keys = stored_keys(model, opened.spec, how)
    stored = packing.open_tensors(tmp_path / "packed")
    for name, key in keys.items():
        assert torch.equal(model.get_parameter(name), stored[key].bfloat16()), name
    routers = {f"{layer.router}.weight" for layer in opened.spec.layers}
    assert routers <= set(keys)
    assert len(keys) - len(routers) == (len([r for r in opened.spec.kept if r.group == "norm"]) if how.tune else 0)
    reads: dict[int, Any] = {}
    handles = [
        model.get_submodule(layer.router).register_forward_pre_hook(
            lambda _, given, at=layer.index: reads.update({at: given[0].reshape(-1, given[0].shape[-1])})
        )
        for layer in opened.spec.layers
    ]
    seen = observe(model, opened.spec, BATCHES)
    for handle in handles:
        handle.remove()
    assert all(torch.equal(reads[index], routed.hidden) for index, routed in seen.items())
    if family == "molmo":
        with pytest.raises(ModelError, match="align without tuning norms"):
            stored_keys(model, opened.spec, Alignment(tune=1e-4))


def test_two_routers_in_a_layer_are_refused_at_once(tiny_model: Make, tmp_path: Path) -> None:
    folder = tiny_model("ernie4_5_vl_moe")
    with pytest.raises(InputError, match="two routers in a layer"):
        quantize(folder, tmp_path / "out", uniform=Precision(4, 32), align=Alignment())
    assert not list(tmp_path.iterdir())
    made = quantize(folder, tmp_path / "out", uniform=Precision(4, 32), method="rtn", evaluated=False)
    with pytest.raises(InputError, match="two routers in a layer"):
        align(made.path, folder)


def test_a_router_that_is_not_linear_is_refused(tiny_model: Make) -> None:
    folder = tiny_model("olmoe")
    opened, model = open_model(folder), load_original(folder)
    model.get_submodule(opened.spec.layers[1].router).weight = None
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.gate is a .* without a weight of 8 x 64"):
        stored_keys(model, opened.spec, Alignment())


def verdict(value: float) -> Callable[..., Estimate]:
    return lambda *given: Estimate(value, value - 0.1, value + 0.1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text(
        "\n".join(json.dumps({"text": f"{i}: " + "Pack my box with jugs, quickly. " * 40}) for i in range(20))
    )
    return path


@pytest.fixture
def packed(tiny_model: Make, tmp_path: Path, text: Path) -> Path:
    out = tmp_path / "packed"
    how = Calibration(str(text), samples=4, length=48)
    quantize(tiny_model("olmoe"), out, uniform=Precision(2, 32), method="rtn", calibration=how, evaluated=False)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


FEW = ["--samples", "4", "--length", "48"]


@pytest.mark.parametrize(("tune", "kept"), [(0.0, True), (0.001, True), (0.001, False)])
def test_a_folder_gets_other_routers_or_stays_as_it_was(
    tune: float, kept: bool, tiny_model: Make, packed: Path, text: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before, tensors = contents(packed), packing.open_tensors(packed)
    monkeypatch.setattr(align_module, "paired_difference", verdict(-1.0 if kept else 1.0))
    words = ["align", str(packed), "--against", str(tiny_model("olmoe")), "--data", str(text), *FEW]
    assert main([*words, *(["--tune", str(tune)] if tune else [])]) == 0
    said = capsys.readouterr().out
    assert ("routers aligned: on " if kept else "routers as they were, aligned ones do not lower") in said
    found = read_json(packed / ALIGNED)
    assert found["kept"] is kept
    assert found["sentence"] == read_json(packed / "mopeq" / "run.json")["aligned"]
    verify(packed)
    after = packing.open_tensors(packed)
    changed = {key for key, tensor in after.items() if not torch.equal(tensor, tensors[key])}
    assert set(after) == set(tensors)
    if not kept:
        written = {ALIGNED, "mopeq/run.json"}
        assert {k: v for k, v in contents(packed).items() if k not in written} == {
            k: v for k, v in before.items() if k not in written
        }
    else:
        assert all("mlp.gate" in key or "norm" in key for key in changed)
        assert {key for key in after if "mlp.gate" in key} <= changed
        assert any("norm" in key for key in changed) == bool(tune)
        assert read_json(packed / "mopeq" / "evaluation.json")["divergence"]["tokens"] > 0
    assert not list(packed.parent.glob("packed.*"))
    load(packed)


def test_it_goes_with_quantize_and_with_a_run_that_goes_on(
    tiny_model: Make, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(align_module, "paired_difference", verdict(-1.0))
    out, model = tmp_path / "out", str(tiny_model("olmoe"))
    words = ["quantize", model, "-o", str(out), "--uniform", "2g32", "--data", str(text), *FEW, "--align", "--json"]
    with monkeypatch.context() as patch:
        patch.setattr("mopeq.quantize.align_folder", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(words) != 0
    verify(out)
    capsys.readouterr()
    assert main([*words, "--resume"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["aligned"].startswith("routers aligned: on ")
    assert read_json(out / "mopeq" / "run.json")["aligned"] == said["aligned"]
    assert (out / "mopeq" / "evaluation.json").is_file()
    before = contents(out)
    assert main([*words, "--resume"]) == 0  # nothing is left to do
    assert contents(out) == before
    assert main(["report", str(out)]) == 0
    assert "Routers aligned: on " in (out / "mopeq" / "report.html").read_text(encoding="utf-8")


def test_killed_between_its_renames_a_folder_comes_back(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, key = contents(packed), "model.layers.0.mlp.gate.weight"
    value = packing.open_tensors(packed)[key] + 1
    real, calls = Path.rename, 0

    def rename(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise SystemExit("killed")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(SystemExit):
            with_tensors(packed, {key: value})
    assert not packed.exists()
    restored(packed)
    assert contents(packed) == before
    with_tensors(packed, {key: value})
    assert torch.equal(packing.open_tensors(packed)[key], value)
    with pytest.raises(CheckpointError, match="no tensor nothing of shape"):
        with_tensors(packed, {"nothing": value})


def test_bad_requests_get_a_sentence(tiny_model: Make, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["align", str(packed), "--against", str(tiny_model("mixtral"))]) != 0
    assert "is not the original of" in capsys.readouterr().err
    assert main(["quantize", "model", "-o", "out", "--uniform", "3", "--tune", "0.1"]) != 0
    assert "--tune does not apply here, it belongs to --align" in capsys.readouterr().err
    for given in ({"steps": -1}, {"tune": 2.0}, {"steps": 0}):
        with pytest.raises(InputError, match="expected steps from 0 on"):
            Alignment(**given)


def test_on_the_bundled_model_choices_come_nearer() -> None:
    """Rounded to 2 bits, its routers choose more of the original's experts after alignment; the KL decides."""
    opened = calibrated(open_model(bundled_model()), Calibration(samples=24, length=128, batch_size=8))
    original, model = (load_original(bundled_model(), dtype=torch.float32) for _ in range(2))
    for layer in opened.spec.layers:
        for p in model.get_submodule(layer.module).parameters():
            p.data.copy_(dequantize(rtn(p.data, Precision(2, 128))))
    tokenizer = load_tokenizer(bundled_model())
    windows = text_windows(read_texts(bundled_text("heldout_docs.txt")), tokenizer, 128, limit=12)
    test = window_batches(windows, 4)
    routers = [f"{layer.router}.weight" for layer in opened.spec.layers]
    found = aligned(
        original, model, opened.spec, opened.batches, test, lambda m: divergence(original, m, windows), Alignment()
    )
    assert found.after > found.before
    assert found.difference.value == pytest.approx(found.kl_after - found.kl_before)
    assert found.kept == (found.difference.high is not None and found.difference.high < 0)
    same = [torch.equal(model.get_parameter(name), original.get_parameter(name)) for name in routers]
    assert not any(same) if found.kept else all(same)


def test_images_are_aligned_too(tmp_path: Path) -> None:
    lines = bundled_images("calibration.jsonl").read_text(encoding="utf-8").splitlines()
    conversations = tmp_path / "images.jsonl"  # of which a tenth is kept apart, and 32 of that for the last comparison
    conversations.write_text("\n".join((lines * (420 // len(lines) + 1))[:420]), encoding="utf-8")
    data = Calibration(str(conversations), samples=4, batch_size=2)
    out = tmp_path / "packed"
    opened = open_model(bundled_vlm())
    precisions = PrecisionMap.uniform(opened.inventory.experts, Precision(2, 32), DEFAULT_REST)
    packing.pack_model(bundled_vlm(), out, precisions)
    for file in bundled_vlm().glob("*"):
        if file.suffix == ".json" and not (out / file.name).exists() and "index" not in file.name:
            (out / file.name).write_bytes(file.read_bytes())
    found = align(out, bundled_vlm(), calibration=data, how=Alignment(steps=20))
    assert found.windows >= 8
    assert 0.5 < found.before <= 1
    verify(out)
