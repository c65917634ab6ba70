"""Codebooks from a map to a packed model that runs, and what becomes of them on the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import packing
from mopeq.checkpoint import read_packed, verify
from mopeq.cli import main
from mopeq.errors import CheckpointError, InputError, MapError
from mopeq.export.fields import Field, common
from mopeq.export.verb import plan_export
from mopeq.kernels import cpu, using
from mopeq.load import load, load_original
from mopeq.measure import Calibration
from mopeq.precision import GROUPS, Precision, PrecisionMap, parse_precision
from mopeq.qtensor import PAIRS, Codes, dequantize, integers, pack, unpack
from mopeq.quantize import quantize
from mopeq.runtime import packed_modules

Make = Callable[..., Path]
BOOK = Precision(2, 64, codebook=True)
IDS = torch.arange(24)[None] + 40


def test_how_it_is_written() -> None:
    assert parse_precision("2g64c") == BOOK
    assert str(BOOK) == "2g64c"
    assert (BOOK.symmetric, BOOK.levels, BOOK.nbytes(8, 128)) == (True, 16, 8 * 128 // 4 + 8 * 2 * 2)
    assert parse_precision("2", BOOK) == Precision(2, 64, True)
    with pytest.raises(MapError, match="a codebook at 3 bits; there is one at 2 bits, such as 2g128c"):
        parse_precision("3g64c")
    with pytest.raises(
        MapError, match="a codebook does not fit rows of 96 inputs: expected a multiple of 64; use 2g32"
    ):
        Precision(2, 32, codebook=True).nbytes(8, 96)
    rows = {g: {0: (BOOK, Precision(3, 64), Precision(2, 64))} for g in GROUPS}
    made = PrecisionMap(rows, {"attention": Precision(2, 32, codebook=True)})
    assert made.to_json()["experts"]["down"] == {"0": ["2g64c", 3, 2]}
    assert PrecisionMap.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_a_code_stands_for_two_weights() -> None:
    """Bit by bit as docs/format.md has it."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (8, 64), generator=draw, dtype=torch.uint8)
    scales = (torch.rand(8, 2, generator=draw) + 0.1).half()
    matrix = pack(Codes(codes, scales, None, BOOK))
    assert unpack(matrix).codes.equal(codes)
    dense, whole = dequantize(matrix), integers(unpack(matrix))
    assert (matrix.shape, matrix.qweight.shape, matrix.nbytes) == ((8, 128), (8, 32), BOOK.nbytes(8, 128))
    for row in range(8):
        for i in range(64):
            byte = int(matrix.qweight[row, i // 2])
            a, b = PAIRS[byte >> 4 if i % 2 else byte & 15]
            first = i // 4 * 8 + i % 4
            assert [int(whole[row, first]), int(whole[row, first + 4])] == [a, b]
            scale = float(scales[row, first // 64])
            assert [float(dense[row, first]), float(dense[row, first + 4])] == [a * scale, b * scale]


@pytest.fixture
def packed(tiny_model: Make, tmp_path: Path) -> Path:
    """An OLMoE of alternating codebooks and other widths, in its experts and outside them."""
    kinds = (BOOK, Precision(3, 32), Precision(2, -1, codebook=True), Precision(2, 64))
    experts = {g: {k: tuple(kinds[(e + i) % 4] for e in range(8)) for k in range(2)} for i, g in enumerate(GROUPS)}
    precisions = PrecisionMap(experts, {"attention": Precision(2, 32, codebook=True)})
    packing.pack_model(tiny_model("olmoe", num_experts=8), tmp_path / "packed", precisions)
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
        model.save_pretrained(tmp_path / "again")
        assert {m.form for m in packed_modules(model).values() if hasattr(m, "form")} <= {"panels", "plain"}
        again = load(tmp_path / "again", dtype=torch.float32)
        assert again(IDS).logits.equal(model(IDS).logits)


def test_readers_of_version_1_refuse_it(packed: Path) -> None:
    file = packed / "config.json"
    config = json.loads(file.read_text())
    assert config["quantization_config"]["format_version"] == 2
    config["quantization_config"]["format_version"] = 1
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="format_version 1; its precisions are those of version 2"):
        load(packed)


def test_a_budget_chooses_among_them(tiny_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"{i}: The quick brown fox jumps. " * 60}) for i in range(12)))
    words = ["quantize", str(tiny_model("olmoe")), "-o", str(tmp_path / "out"), "--budget", "2.8bpw", "--data",
             str(data), "--samples", "8", "--length", "64", "--levels", "2g64c,2g64,4g64", "--no-eval"]  # fmt: skip
    assert main(words) == 0, capsys.readouterr().err
    manifest = verify(tmp_path / "out")
    assert manifest.inventory.expert_bits(manifest.precisions) <= 2.8
    assert {"2g64c", "4g64"} <= {str(p) for p in manifest.precisions.histogram()}
    assert load(tmp_path / "out")(IDS).logits.isfinite().all()
    capsys.readouterr()
    assert main([*words[:3], str(tmp_path / "other"), *words[4:], "--method", "hqq"]) != 0
    assert "2g64c has a codebook, which hqq cannot make; choose the method gptq or rtn-mse" in capsys.readouterr().err
    with pytest.raises(InputError, match="which rtn cannot make"):
        quantize(tiny_model("olmoe"), tmp_path / "other", uniform=BOOK, method="rtn", calibration=Calibration())
    assert not (tmp_path / "other").exists()


def test_exports_hold_its_integers_or_its_weights(packed: Path) -> None:
    assert common([BOOK, Precision(3, 32)], (4, 8)) == Field(8, 32)
    name = next(base for base, _, precision in verify(packed).matrices() if precision == BOOK)
    weight = dequantize(read_packed(packed, name))
    whole = plan_export(packed, "auto-round")
    assert whole.stored[name] == Field(16)
    assert dict(whole.tensors())[f"{name}.weight"].equal(weight.bfloat16())
    eight = plan_export(packed, "compressed-tensors")
    assert isinstance(eight.stored[name], Field)
    assert eight.stored[name].bits == 8
