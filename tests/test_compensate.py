"""Layers packed on what the packed layers before give: what they see, what they are asked for, and what it is worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import killing
from compensating import nearer
from mopeq.analyze.forward import token_mask
from mopeq.checkpoint import read_headers, read_packed
from mopeq.cli import main
from mopeq.compensate import PRIOR, Both, Pair, gain_of, shifted
from mopeq.data.samples import bundled_images, bundled_model, bundled_vlm
from mopeq.errors import ModelError
from mopeq.evaluate import paired_difference
from mopeq.load import load, load_original
from mopeq.measure import Calibration, calibrated, open_model
from mopeq.precision import DEFAULT_REST, FULL, GROUPS, LEFT_OUT, Precision, PrecisionMap
from mopeq.quantize import quantize
from mopeq.runtime.experts import without
from mopeq.stream import Shell, Store

Make = Callable[..., Path]
REST = {"attention": Precision(4, 32), "lm_head": Precision(8, 32)}


def test_shifted_weights_are_those_of_least_squares() -> None:
    """Beside torch's solver of the stacked system: the tokens, and rows that hold the weights where they are."""
    draw = torch.Generator().manual_seed(0)
    weight, x, y = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((5, 7), (40, 7), (40, 5)))
    moments = x.T @ x
    damping = PRIOR * 7 * float(moments.diagonal().mean()) / len(x)
    rows = torch.cat([x, damping**0.5 * torch.eye(7, dtype=torch.float64)])
    change = torch.linalg.lstsq(rows, torch.cat([y - x @ weight.T, torch.zeros(7, 5, dtype=torch.float64)])).solution.T
    found = shifted(weight, (y - x @ weight.T).T @ x, moments, len(x))
    torch.testing.assert_close(found, weight + change)
    assert shifted(weight, torch.zeros(5, 7), torch.zeros(7, 7), 0) is weight


def prepared(folder: Path, tmp_path: Path) -> Any:
    """A tiny model's calibration batches, one of which has padding."""
    made = calibrated(open_model(folder), replace(killing.text(tmp_path), samples=6, length=24, batch_size=3))
    made.batches[1]["attention_mask"][0, 17:] = 0
    return made


def followed(made: Any, precisions: PrecisionMap, packed: Path) -> dict[int, Pair]:
    """What every layer is given when those before it are packed as a packed folder has them."""
    both, found = Both(Shell(made.source, made.spec), made.batches, Store(), precisions), {}
    for layer in made.spec.layers:
        for at, _, pair in both.reach(layer):
            found[at.index] = pair
            names = [name for expert in at.experts for name in expert.names.values()]
            there = set(read_headers(packed.glob("*.safetensors")))
            both.take(at, [(n, read_packed(packed, n)) for n in names if f"{n}.qweight" in there])
    return found


class Whole:
    """A model in one piece: what goes into the experts of a layer, and what its decoder layer gives."""

    def __init__(self, model: Any, layer: Any) -> None:
        self.experts = model.get_submodule(layer.module)
        self.block = model.get_submodule(
            layer.module.partition(f"layers.{layer.decoder}.")[0] + f"layers.{layer.decoder}"
        )
        self.model, self.inputs, self.outputs = model, list[Any](), list[Tensor]()

    def run(self, batches: Any, inputs: Any = None, experts: Any = None, left_out: Tensor | None = None) -> Whole:
        """With other experts on other inputs, if these are given."""

        def swapped(module: nn.Module, args: Any, kwargs: Any) -> Any:
            names = ("hidden_states", "top_k_index", "top_k_weights")
            self.inputs.append(dict(zip(names, args, strict=False)) | kwargs)

        def other(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Any:
            if experts is None:
                return None
            called = dict(self.inputs[-1])
            called["hidden_states"] = inputs[len(self.inputs) - 1]["hidden_states"]
            if left_out is not None:
                _, weights = without(called["top_k_index"], called["top_k_weights"], left_out)
                called |= {"top_k_weights": weights.to(called["top_k_weights"].dtype)}
            return experts(**called)

        handles = [
            self.experts.register_forward_pre_hook(swapped, with_kwargs=True),
            self.experts.register_forward_hook(other, with_kwargs=True),
            self.block.register_forward_hook(lambda m, a, out: self.outputs.append(out)),
        ]
        with torch.no_grad():
            for batch in batches:
                self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        for handle in handles:
            handle.remove()
        return self

    def rows(self, batches: Any, parts: Any) -> Tensor:
        keep = [token_mask(batch).flatten() for batch in batches]
        return torch.cat([part.flatten(0, -2)[kept] for part, kept in zip(parts, keep, strict=True)])


@pytest.mark.parametrize("left_out", [False, True], ids=["all experts", "some left out"])
@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v2", "gpt_oss", "granitemoe"])
def test_a_layer_is_given_what_whole_models_say(family: str, left_out: bool, tiny_model: Make, tmp_path: Path) -> None:
    """The packed model as it is loaded, with the original's experts in the layer in turn."""
    folder = tiny_model(family)
    made = prepared(folder, tmp_path)
    experts = made.inventory.experts
    rows = {layer: [Precision(2, 32)] * count for layer, count in experts.items()}
    if left_out:
        for row in rows.values():
            row[1] = LEFT_OUT
    precisions = PrecisionMap({"gate_up": rows, "down": rows}, {**DEFAULT_REST, **REST})
    packed = tmp_path / "packed"
    quantize(folder, packed, precisions=precisions, method="rtn", evaluated=False)
    found = followed(made, precisions, packed)
    original, small = load_original(folder), load(packed, dtype=torch.float32)
    gain = getattr(original.config, "residual_multiplier", 1.0)
    assert set(found) == set(experts)
    for layer in made.spec.layers:
        gone = torch.tensor([p == LEFT_OUT for p in rows[layer.index]]) if left_out else None
        wanted = Whole(original, layer).run(made.batches)
        given = Whole(small, layer).run(made.batches, wanted.inputs, wanted.experts, gone)
        pair, inputs = found[layer.index], [[call["hidden_states"] for call in w.inputs] for w in (given, wanted)]
        close = {"rtol": 1e-2, "atol": 2e-3}  # the packed model's kernels have other roundings than dequantized weights
        torch.testing.assert_close(pair.seen.hidden, given.rows(made.batches, inputs[0]), **close)
        torch.testing.assert_close(pair.wanted, wanted.rows(made.batches, inputs[1]), rtol=1e-5, atol=1e-5)
        lacks = wanted.rows(made.batches, wanted.outputs) - given.rows(made.batches, given.outputs)
        torch.testing.assert_close(pair.missing * gain, lacks, rtol=2e-2, atol=4e-3)
        assert lacks.abs().max() > 0.05
        assert not left_out or not (pair.seen.index == 1).any()


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "llama4_text", "ernie4_5_moe", "molmo", "phimoe"])
def test_what_was_calibrated_on_is_nearer(family: str, tiny_model: Make, tmp_path: Path) -> None:
    """With every kind of experts module."""
    assert nearer(tiny_model(family), replace(killing.text(tmp_path), samples=24, length=48), tmp_path) < 0.97


def test_images_go_through_both(tmp_path: Path) -> None:
    data = Calibration(str(bundled_images("calibration.jsonl")), samples=16, batch_size=8)
    assert nearer(bundled_vlm(), data, tmp_path) < 0.97


def test_the_number_before_the_experts_is_found(tiny_model: Make, tmp_path: Path) -> None:
    folder = tiny_model("granitemoe", residual_multiplier=0.25)
    made = prepared(folder, tmp_path)
    assert gain_of(Shell(made.source, made.spec), made.batches[0]) == pytest.approx(0.25, rel=1e-4)
    shell = Shell(made.source, made.spec)
    block = shell.model.get_submodule(made.spec.layers[0].module.rpartition(".")[0])
    block.register_forward_hook(lambda module, args, output: nn.functional.layer_norm(output, output.shape[-1:]) ** 3)
    with pytest.raises(ModelError, match=r"times a number, is not what .* use --no-compensate"):
        gain_of(shell, made.batches[0])


def test_experts_that_give_nothing_have_no_number(tiny_model: Make, tmp_path: Path) -> None:
    made = prepared(tiny_model("olmoe"), tmp_path)
    shell = Shell(made.source, made.spec)
    module = shell.model.get_submodule(made.spec.layers[0].module)
    module.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    with pytest.raises(ModelError, match=r"times 0, 0 % is other"):
        gain_of(shell, made.batches[0])


def test_a_model_that_cannot_is_refused_before_it_is_measured(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object) -> float:
        raise ModelError("it cannot")

    monkeypatch.setattr("mopeq.quantize.gain_of", refused)
    monkeypatch.setattr("mopeq.quantize.measure_streamed", lambda *_, **__: pytest.fail("measured"))
    command = ["quantize", str(tiny_model("olmoe")), "-o", str(tmp_path / "out"), "--budget", "3.5bpw", "--compensate"]
    assert main([*command, "--group-size", "32", "--no-eval", "--data", str(killing.text(tmp_path).data)]) == 2
    assert "it cannot" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_every_kind_of_precision(tiny_model: Make, tmp_path: Path) -> None:
    """16 bits, which stay, rotated inputs, a codebook, a row's one scale, and none, in one layer."""
    folder, calibration = tiny_model("mixtral"), replace(killing.text(tmp_path), samples=24, length=48)
    kinds = [FULL, Precision(2, 32, hadamard=True), Precision(2, 32, codebook=True), Precision(3, -1, symmetric=True)]
    layers = open_model(folder).inventory.experts
    experts = {g: {layer: tuple(kinds[i % 4] for i in range(n)) for layer, n in layers.items()} for g in GROUPS}
    for group in GROUPS:
        experts[group][max(layers)] = (LEFT_OUT, *experts[group][max(layers)][1:])
    precisions = PrecisionMap(experts, DEFAULT_REST)
    assert nearer(folder, calibration, tmp_path, precisions=precisions) < 0.97


def test_less_of_the_model_is_lost(tmp_path: Path) -> None:
    """On the bundled trained model at 2 bits, on text that nothing was calibrated on."""
    model, data = bundled_model(), Calibration(samples=96, length=128)
    found = [
        quantize(model, tmp_path / str(way), uniform=Precision(2, 128), calibration=data, compensate=way).evaluation
        for way in (False, True)
    ]
    plain, compensated = (e.divergence for e in found if e is not None and e.divergence is not None)
    gain = paired_difference(compensated, plain)
    assert gain.high is not None
    assert gain.high < 0
    assert gain.value < -0.1 * plain.kl.value


def test_refusals(tiny_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["quantize", str(tiny_model("olmoe")), "-o", str(tmp_path / "out"), "--uniform", "3", "--compensate"]
    assert main([*command, "--method", "rtn-mse"]) == 2
    assert (
        "rtn-mse cannot make up for errors of earlier layers, gptq can; use that, or --no-compensate"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
