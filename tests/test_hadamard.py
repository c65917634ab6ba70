"""Rotated inputs: the rotation, its quantizers, and packed models that run with it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import killing
import packing
from mopeq.analyze.cost import layer_costs
from mopeq.checkpoint import read_packed, verify
from mopeq.cli import main
from mopeq.errors import CheckpointError, InputError, MapError
from mopeq.export.fields import Field, common
from mopeq.export.verb import plan_export
from mopeq.hadamard import restored, rotated, rotation, run_length
from mopeq.integrations.vllm.parts import Cut
from mopeq.kernels import PackedGroup, cpu, naive, using
from mopeq.kernels.interface import KERNELS
from mopeq.kernels.layout import GroupLayout
from mopeq.load import load, load_original
from mopeq.measure import observed, open_model, split_texts
from mopeq.pack import pack_model
from mopeq.precision import FULL, GROUPS, Precision, PrecisionMap, parse_precision
from mopeq.qtensor import dequantize, pack
from mopeq.quantize import quantize
from mopeq.quantizers import QUANTIZERS, gptq, once, rtn
from test_pack import same, stored

Make = Callable[..., Path]
TURNED = Precision(2, 32, hadamard=True)
IDS = torch.arange(24)[None] + 40


@pytest.mark.parametrize("inputs", [32, 96, 128, 256])
def test_the_fast_rotation_is_the_matrix(inputs: int) -> None:
    size = run_length(inputs)
    assert inputs % size == 0
    assert inputs // size % 2 == 1
    matrix, x = rotation(size), torch.randn(3, 5, inputs)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size), atol=1e-5)
    wanted = torch.cat([part @ matrix.T for part in x.split(size, -1)], -1)
    assert torch.allclose(rotated(x), wanted, atol=1e-5)
    assert torch.allclose(restored(rotated(x)), x, atol=1e-5)


def test_a_constant_and_a_single_input_are_spread() -> None:
    """No number of the result is far above the others: what the signs are for."""
    for x in (torch.ones(256), torch.eye(256)[7]):
        assert rotated(x).abs().max() <= 2.01 * x.norm() / math.sqrt(256)


def test_how_it_is_written() -> None:
    assert parse_precision("2g32h") == TURNED
    assert str(TURNED) == "2g32h"
    assert str(parse_precision("2g128ch")) == "2g128ch"
    assert parse_precision("3", Precision(4, 64, hadamard=True)) == Precision(3, 64, hadamard=True)
    assert parse_precision("3h", Precision(4, 64)) == Precision(3, 64, hadamard=True)
    assert TURNED.nbytes(8, 64) == replace(TURNED, hadamard=False).nbytes(8, 64)
    assert Precision(16, hadamard=True) == FULL
    rows = {g: {0: (TURNED, Precision(3, 64), Precision(2, 32))} for g in GROUPS}
    made = PrecisionMap(rows, {})
    assert made.to_json()["experts"]["down"]["0"][0] == "2g32h"
    assert PrecisionMap.from_json(json.loads(json.dumps(made.to_json()))) == made
    with pytest.raises(MapError, match="2g32h outside the routed experts; only experts can have rotated inputs"):
        PrecisionMap(rows, {"attention": TURNED})


@pytest.mark.parametrize("method", ["rtn", "rtn-mse", "hqq", "gptq"])
def test_quantizers_work_on_rotated_weights(method: str) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(2, 16, 96, generator=draw), torch.randn(2, 300, 96, generator=draw)
    moments, r = x.mT @ x, torch.block_diag(*[rotation(32)] * 3)
    codes = QUANTIZERS[method](weight, TURNED, moments)
    by_hand = QUANTIZERS[method](weight @ r.T, replace(TURNED, hadamard=False), r @ moments @ r.T)
    assert codes.precision == TURNED
    assert float((codes.codes == by_hand.codes).double().mean()) > 0.99
    assert torch.allclose(dequantize(codes), dequantize(replace(codes, precision=by_hand.precision)) @ r, atol=1e-5)


def test_factors_are_shared_among_those_of_a_kind() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(2, 16, 64, generator=draw), torch.randn(2, 300, 64, generator=draw)
    moments = x.mT @ x
    for p in (TURNED, replace(TURNED, hadamard=False)):
        assert gptq(weight, p, once(gptq, moments, p.hadamard)).codes.equal(gptq(weight, p, moments).codes)


def test_outliers_cost_less() -> None:
    """One large input in each row spoils a grid of 2 bits; rotated it is spread."""
    weight = torch.randn(1, 64, 128, generator=torch.Generator().manual_seed(0))
    weight[:, :, 5] *= 12
    errors = [
        float((dequantize(rtn(weight, p)) - weight).square().sum())
        for p in (Precision(2, -1), Precision(2, -1, hadamard=True))
    ]
    assert errors[1] < 0.7 * errors[0]


def group(precisions: list[Precision], inputs: int, seed: int = 0) -> PackedGroup:
    """Two stacked matrices of 32 rows for each expert, random."""
    layout = GroupLayout(tuple(precisions), ((32, inputs), (32, inputs)))
    draw = torch.Generator().manual_seed(seed)
    buffers = {}
    made = [[pack(rtn(torch.randn(1, 32, inputs, generator=draw), p)[0]) for _ in range(2)] for p in precisions]
    for part, dtype in (("qweight", torch.uint8), ("scales", torch.float16), ("zeros", torch.uint8)):
        buffers[part] = torch.zeros(layout.size(part), dtype=dtype)
        for expert, matrices in enumerate(made):
            for view, matrix in zip(layout.views(buffers[part], part, expert), matrices, strict=False):
                view.copy_(getattr(matrix, part))
    return PackedGroup(layout, **buffers)


@pytest.mark.skipif(bool(cpu.why_not()), reason="no compiled kernel")
@pytest.mark.parametrize("inputs", [96, 256])
@pytest.mark.parametrize("isa", cpu.ISAS)
def test_the_compiled_kernel_rotates_where_it_must(isa: str, inputs: int) -> None:
    """Mixed in one layer, with plain experts and symmetric ones between; the same bits by every instruction set."""
    library = cpu.library()
    before = library.mopeq_isa()
    kinds = [TURNED, Precision(3, 32), Precision(4, 32, True, hadamard=True), Precision(8, -1, hadamard=True)]
    plain = group(kinds, inputs)
    x, offsets = torch.randn(20, inputs, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 5, 9, 15, 20])
    wanted = naive.grouped_linear(x, plain, offsets)
    panels = cpu.convert(group(kinds, inputs), "panels")
    portable: torch.Tensor | None = None
    try:
        if library.mopeq_use_isa(0) == 0:
            portable = cpu.grouped_linear(x, panels, offsets)
        if library.mopeq_use_isa(cpu.ISAS.index(isa)):
            pytest.skip(f"this machine has no {isa}")
        found = cpu.grouped_linear(x, panels, offsets)
    finally:
        library.mopeq_use_isa(before)
    assert (found - wanted).norm() / wanted.norm() < 2e-6
    assert portable is not None
    assert found.equal(portable)


@pytest.fixture
def packed(tiny_model: Make, tmp_path: Path) -> Path:
    """An OLMoE whose experts have rotated inputs or not."""
    kinds = (
        TURNED,
        Precision(3, 32),
        Precision(2, 64, codebook=True, hadamard=True),
        Precision(4, 64, True, hadamard=True),
    )
    experts = {g: {k: tuple(kinds[(e + i) % 4] for e in range(8)) for k in range(2)} for i, g in enumerate(GROUPS)}
    packing.pack_model(tiny_model("olmoe", num_experts=8), tmp_path / "packed", PrecisionMap(experts, {}))
    return tmp_path / "packed"


@pytest.mark.parametrize("kernel", ["naive", pytest.param("cpu", marks=pytest.mark.skipif(
    bool(cpu.why_not()), reason="no compiled kernel"))])  # fmt: skip
@torch.no_grad()
def test_logits_are_those_of_the_dequantized_model(kernel: str, packed: Path, tiny_model: Make, tmp_path: Path) -> None:
    verify(packed)
    dense = load_original(packing.dequantized(tiny_model("olmoe", num_experts=8), packed, tmp_path / "dense"))
    want = dense.float()(IDS).logits
    with using(kernel):
        model = load(packed, dtype=torch.float32)
        assert (model(IDS).logits - want).norm() / want.norm() < 1e-5
        one = model(IDS[:, :1]).logits  # a token at a time
        assert (one - dense(IDS[:, :1]).logits).norm() / one.norm() < 1e-5


def test_older_readers_refuse_it(packed: Path) -> None:
    file = packed / "config.json"
    config = json.loads(file.read_text())
    assert config["quantization_config"]["format_version"] == 3
    config["quantization_config"]["format_version"] = 2
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="format_version 2; its precisions are those of version 3"):
        load(packed)


def test_exports_hold_its_weights_or_refuse(packed: Path) -> None:
    assert common([TURNED], (4, 8)) is None
    name = next(base for base, _, precision in verify(packed).matrices() if precision == TURNED)
    whole = plan_export(packed, "auto-round")
    assert whole.stored[name] == Field(16)
    assert dict(whole.tensors())[f"{name}.weight"].equal(dequantize(read_packed(packed, name)).bfloat16())
    with pytest.raises(InputError, match=r"compressed-tensors holds all of them as 4-bit or 8-bit integers, which .*h"):
        plan_export(packed, "compressed-tensors")


def test_other_kernels_and_cut_rows_are_refused() -> None:
    layout = GroupLayout((TURNED,), ((32, 64),))
    for name in ("triton", "humming"):
        assert KERNELS[name].why_not(layout, torch.device("cuda"), torch.bfloat16)
    Cut((0, 16), (0, 64)).check("down", (32, 64), TURNED)
    with pytest.raises(InputError, match="expected multiples of 64"):
        Cut((0, 32), (0, 32)).check("down", (32, 64), TURNED)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_streaming_packs_what_the_whole_model_gives(
    method: str, tiny_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, calibration = tiny_model("olmoe"), killing.text(tmp_path)
    options = [TURNED, Precision(2, 32), Precision(4, 32, hadamard=True)]
    made = quantize(
        folder,
        tmp_path / "a",
        budget="3.2bpw",
        options=options,
        calibration=calibration,
        method=method,
        evaluated=False,
    )
    assert any(p.hadamard for p in made.precisions.histogram())
    whole = observed(open_model(folder), calibration, texts=split_texts(calibration, folder)[0], gradients=False)
    pack_model(whole, made.precisions, tmp_path / "b", method=method)
    assert same(stored(tmp_path / "a"), stored(tmp_path / "b"))
    words = ["quantize", str(folder), "-o", str(tmp_path / "c"), "--uniform", "3", "--group-size", "32", "--hadamard",
             "--method", "rtn", "--no-eval"]  # fmt: skip
    assert main(words) == 0, capsys.readouterr().err
    assert set(verify(tmp_path / "c").precisions.histogram()) == {Precision(3, 32, hadamard=True)}


def test_costs_are_of_what_the_codes_stand_for(tiny_model: Make, tmp_path: Path) -> None:
    """At 8 bits next to nothing is lost, rotated or not; rotated weights taken as they lie would lose everything."""
    ready = observed(open_model(tiny_model("olmoe")), killing.text(tmp_path), gradients=False)
    layer = ready.spec.layers[0]
    module, seen = ready.model.get_submodule(layer.module), ready.routed[layer.index]
    weights = {"gate_up": module.gate_up_proj.data.float(), "down": module.down_proj.data.float()}
    options = [Precision(8, 32), Precision(8, 32, hadamard=True), Precision(2, 32)]
    found = layer_costs(seen, module, weights, None, options, rtn, costs=("output_error",))
    for which in GROUPS:
        plain, turned, coarse = (sum(found[f"output_error/{which}/{p}"]) for p in options)
        assert turned < 3 * plain
        assert turned < 0.01 * coarse
