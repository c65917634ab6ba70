"""Checkpoints of other quantizers as sources, against their own code and against packings written down bit by bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from torch import Tensor

from mopeq import load
from mopeq.checkpoint import read_manifest, verify
from mopeq.cli import main
from mopeq.errors import ModelError
from mopeq.export import plan_export, write_export
from mopeq.foreign import dequantized, find_packed
from mopeq.load import load_source
from mopeq.measure import open_model
from mopeq.precision import Precision, PrecisionMap
from mopeq.source import open_source, read_tensor
from packing import pack_model
from tiny import edit_config, rewrite, tensors

Make = Callable[..., Path]
OUT, IN = 32, 64


def words(numbers: list[int], bits: int) -> list[int]:
    """int32 words of a bit string in which number i is bits [i * bits, (i + 1) * bits)."""
    string = sum(n << (i * bits) for i, n in enumerate(numbers))
    made = [string >> (32 * i) & 0xFFFFFFFF for i in range(-(-len(numbers) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in made]


def drawn(bits: int, groups: int, least: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (out, in), zero points and scales (out, groups)."""
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (OUT, IN), generator=draw)
    zeros = torch.randint(least, 1 << bits, (OUT, groups), generator=draw)
    return codes, zeros, (0.5 + torch.rand(OUT, groups, generator=draw)).half()


def wanted(codes: Tensor, zeros: Tensor, scales: Tensor, group: Tensor) -> Tensor:
    return ((codes - zeros[:, group]).float() * scales.float()[:, group]).half()


def read(settings: dict[str, Any], parts: dict[str, Tensor]) -> Tensor:
    stored = {f"a.{suffix}": tensor for suffix, tensor in parts.items()}
    found = find_packed(settings, {k: tuple(t.shape) for k, t in stored.items()}, stored.__getitem__)
    assert list(found) == ["a.weight"]
    return dequantized(found["a.weight"], stored.__getitem__)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["group", "channel"])
def test_compressed_tensors_as_its_own_code_reads_it(bits: int, symmetric: bool, strategy: str) -> None:
    size = 16 if strategy == "group" else None
    arguments = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=size)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    codes, zeros, scales = drawn(bits, IN // 16 if size else 1)
    half = 1 << (bits - 1)
    state = {"weight": codes.half(), "weight_scale": scales}
    if not symmetric:
        state["weight_zero_point"] = (zeros - half).to(torch.int8)
    shift = zeros if not symmetric else torch.full_like(zeros, half)
    group = torch.arange(IN) // (size or IN)
    state["weight"] = ((codes - shift[:, group]).float() * scales.float()[:, group]).half()
    packed = PackedQuantizationCompressor.compress(state, scheme)
    theirs = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    ours = read({"quant_method": "compressed-tensors", "format": "pack-quantized"}, packed)
    assert torch.equal(ours, theirs)
    assert ours.abs().max() > 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("settings", "plus"),
    [
        ({"quant_method": "gptq"}, 1),
        ({"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, 0),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, 1),
        ({"quant_method": "auto-round", "packing_format": "auto_round", "data_type": "int"}, 0),
    ],
)
def test_gptq_by_its_definition(bits: int, settings: dict[str, Any], plus: int) -> None:
    codes, zeros, scales = drawn(bits, 4, least=plus)
    order = torch.arange(IN) // 16
    if plus:  # activation order: a group's inputs are anywhere
        order = order[torch.randperm(IN, generator=torch.Generator().manual_seed(1))]
    parts = {
        "qweight": torch.tensor([words(row, bits) for row in codes.tolist()], dtype=torch.int32).T,
        "qzeros": torch.tensor([words([z - plus for z in row], bits) for row in zeros.T.tolist()], dtype=torch.int32),
        "scales": scales.T,
    }
    if plus:
        parts["g_idx"] = order.int()
    assert torch.equal(read(settings, parts), wanted(codes, zeros, scales, order))


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "awq", "version": "gemm"},
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"},
    ],
)
def test_awq_by_its_definition(settings: dict[str, Any]) -> None:
    codes, zeros, scales = drawn(4, 4)
    places = [0, 2, 4, 6, 1, 3, 5, 7]

    def rows(matrix: Tensor) -> Tensor:
        """Eight neighbours of a row of (in or groups, out) in one word, the one at places[i] in nibble i."""
        made = [words([row[8 * j + place] for j in range(OUT // 8) for place in places], 4) for row in matrix.tolist()]
        return torch.tensor(made, dtype=torch.int32)

    parts = {"qweight": rows(codes.T), "qzeros": rows(zeros.T), "scales": scales.T}
    assert torch.equal(read(settings, parts), wanted(codes, zeros, scales, torch.arange(IN) // 16))


@pytest.fixture
def exported(tiny_model: Make, tmp_path: Path) -> Callable[[str], Path]:
    """A tiny OLMoE whose experts are at 4g32s and the rest at 8g32s, in a foreign format."""
    original = tiny_model("olmoe", dtype=torch.bfloat16)
    layers = open_model(original).inventory.experts
    rest = dict.fromkeys(("attention", "lm_head"), Precision(8, 32, True))
    pack_model(original, tmp_path / "packed", PrecisionMap.uniform(layers, Precision(4, 32, True), rest))

    def make(kind: str) -> Path:
        write_export(plan_export(tmp_path / "packed", kind, dtype="float32"), tmp_path / kind)
        return tmp_path / kind

    return make


@pytest.mark.parametrize("kind", ["compressed-tensors", "auto-round"])
def test_a_source_is_the_model_that_was_packed(kind: str, exported: Callable[[str], Path], tmp_path: Path) -> None:
    source = open_source(exported(kind))
    found = {name: read_tensor(source, name) for name in source.shapes}
    assert {name: tuple(t.shape) for name, t in found.items()} == dict(source.shapes)
    assert "quantization_config" not in source.config
    x = torch.arange(60).view(2, 30) * 3 % 250
    with torch.no_grad():
        ours = load_source(source, torch.float32)(input_ids=x).logits
        expected = load(tmp_path / "packed", torch.float32)(input_ids=x).logits
    assert (ours - expected).norm() < 1.5e-3 * expected.norm()  # weights are rounded to fp16, the type of the scales


def test_quantize_starts_from_one(exported: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    few = ["--samples", "4", "--length", "32", "--levels", "2,3,4", "--group-size", "32"]
    assert main(["quantize", str(exported("auto-round")), "-o", str(out), "--budget", "3.6bpw", *few]) == 0
    verify(out)
    made = read_manifest(out)
    assert made.inventory == read_manifest(tmp_path / "packed").inventory
    assert 3 < made.inventory.expert_bits(made.precisions) <= 3.6
    judged = json.loads((out / "mopeq" / "evaluation.json").read_text())
    assert 0 < judged["divergence"]["kl"]["value"] < 2


def test_what_is_refused(exported: Callable[[str], Path]) -> None:
    folder = exported("compressed-tensors")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]

    def refused(says: str, **changes: object) -> None:
        edit_config(folder, quantization_config={**settings, **changes})
        with pytest.raises(ModelError, match=says):
            open_source(folder)

    refused("with format 'float-quantized'; mopeq reads pack-quantized", format="float-quantized")
    refused("no tensor is named", quant_method="gptq")
    refused("the packing 'mlx'; mopeq reads", quant_method="auto-round", packing_format="mlx")
    refused("with version 'gemv'", quant_method="awq", version="gemv")
    refused(r"already quantized \(fp8\)", quant_method="fp8")
    name = "model.layers.0.mlp.experts.3.up_proj"
    kept = tensors(folder)
    rewrite(folder, {f"{name}.weight_packed": kept[f"{name}.weight_packed"][:, :-1].contiguous()})
    refused(f"the tensors of {name} do not make a matrix")
    rewrite(folder, {f"{name}.weight_scale": None})
    refused(f"{name}.weight_scale is missing")
    save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
    refused("no tensor is named")
