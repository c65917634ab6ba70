"""Exports against the packed model they are made from, read by transformers and by compressed-tensors' own code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from exporting import packed
from torch import Tensor
from transformers import AutoModelForCausalLM

from mopeq import load
from mopeq.checkpoint import read_manifest, read_packed
from mopeq.cli import main
from mopeq.export import auto_round, compressed_tensors, plan_export, write_export
from mopeq.export.fields import Field, common, signed_bits
from mopeq.precision import FULL, Precision
from mopeq.qtensor import Codes, dequantize, pack
from tiny import tensors

Make = Callable[..., Path]
TOKENS = torch.arange(48).view(2, 24) * 5 % 250


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits.float()


def exported(folder: Path, out: Path, kind: str, **options: str) -> Path:
    plan = plan_export(folder, kind, **options)
    assert write_export(plan, out) == sum(f.stat().st_size for f in out.glob("*.safetensors"))
    return out


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2"])
def test_transformers_reads_compressed_tensors(family: str, tiny_model: Make, tmp_path: Path) -> None:
    folder = packed(tiny_model, tmp_path, family, "3g32", "2g64", "4g32s")
    out = exported(folder, tmp_path / "out", "compressed-tensors", uniform="model")
    found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    expected = logits(load(folder, torch.float32))
    # decompressed weights are rounded to the scales' type, fp16
    assert (logits(found) - expected).norm() < 1.5e-3 * expected.norm()
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen2_moe", "deepseek_v2"])
def test_transformers_reads_dequantized(family: str, tiny_model: Make, tmp_path: Path) -> None:
    folder = packed(tiny_model, tmp_path, family, "3g32", "8g-1", "16")
    out = exported(folder, tmp_path / "out", "dequantized", dtype="float32")
    expected = logits(load(folder, torch.float32))
    assert (logits(AutoModelForCausalLM.from_pretrained(out)) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("field", [Field(4, 32), Field(8, 64), Field(8, -1)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_holds_every_code_exactly(field: Field, symmetric: bool) -> None:
    bits = field.bits if symmetric else field.bits - 1
    size = -1 if field.group_size == -1 else 64
    precision = Precision({7: 6}.get(bits, bits), size, symmetric)
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, precision.levels, (16, 128), generator=draw, dtype=torch.uint8)
    groups = precision.group_count(128)
    scales = torch.rand(16, groups, generator=draw).half() + 0.5
    zeros = None if symmetric else torch.randint(0, precision.levels, (16, groups), generator=draw, dtype=torch.uint8)
    codes[:, 0], codes[:, 1] = 0, precision.levels - 1
    matrix = pack(Codes(codes, scales, zeros, precision))
    stored = compressed_tensors.packed(matrix, field)
    integers = unpack_from_int32(stored["weight_packed"], field.bits, torch.Size(stored["weight_shape"].tolist()))
    scale = stored["weight_scale"].float().repeat_interleave(128 // stored["weight_scale"].shape[1], 1)
    assert torch.equal(integers.float() * scale, dequantize(matrix))
    assert sum(t.nbytes for t in stored.values()) == field.nbytes(16, 128) + 16


@pytest.mark.parametrize(
    "precision", [Precision(b, s, y) for b in (2, 3, 4, 5, 6, 8) for s, y in ((32, False), (64, True))]
)
def test_auto_round_is_one_bit_string_a_column(precision: Precision, tiny_model: Make, tmp_path: Path) -> None:
    """Read one code at a time, as its definition says: value i of a column is bits [i*b, (i+1)*b) of its words."""
    folder = packed(tiny_model, tmp_path, "olmoe", str(precision))
    name = "model.layers.0.mlp.experts.0.down_proj"
    matrix = read_packed(folder, name)
    stored = auto_round.packed(matrix)
    columns = [_integers(column.tolist(), precision.bits) for column in stored["qweight"].T]
    zeros = [_integers(row.tolist(), precision.bits) for row in stored["qzeros"]]
    size = precision.group_size
    rebuilt = [
        [(q - zeros[i // size][o]) * float(stored["scales"][i // size, o]) for i, q in enumerate(column)]
        for o, column in enumerate(columns)
    ]
    assert torch.equal(torch.tensor(rebuilt), dequantize(matrix))


def _integers(words: list[int], bits: int) -> list[int]:
    string = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [string >> (i * bits) & ((1 << bits) - 1) for i in range(32 * len(words) // bits)]


def test_fields_hold_what_they_must() -> None:
    assert common([Precision(3, 64), Precision(2, 32)], (4, 8)) == Field(4, 32)
    assert common([Precision(4, 64)], (4, 8)) == Field(8, 64)
    assert common([Precision(4, 64, True), Precision(3, -1)], (4, 8)) == Field(4, 64)
    assert common([Precision(8, 64)], (4, 8)) is None
    assert common([FULL, Precision(3)], (4, 8)) is None
    assert [signed_bits(Precision(8, 64, s)) for s in (True, False)] == [8, 9]


def test_layers_may_differ_and_say_so(tiny_model: Make, tmp_path: Path) -> None:
    folder = packed(tiny_model, tmp_path, "olmoe", "3g32")
    plan = plan_export(folder, "compressed-tensors")
    assert {str(s) for b, s in plan.stored.items() if ".experts." in b} == {"int4, groups of 32"}
    out = exported(folder, tmp_path / "out", "auto-round")
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (settings["bits"], settings["group_size"], settings["sym"]) == (3, 32, False)
    assert settings["extra_config"]["model.layers.1.self_attn.q_proj"] == {"bits": 8, "group_size": 32, "sym": True}
    assert settings["extra_config"]["lm_head"] == {"bits": 16}  # 264 rows are no whole words of 32
    assert settings["extra_config"]["model.layers.0.mlp.gate"] == {"bits": 16}
    assert plan.nbytes < read_manifest(folder).inventory.parameters


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(list(map(str, arguments))) in (1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_what_is_refused(tiny_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = packed(tiny_model, tmp_path, "olmoe", "3g32", "8g32")
    out = tmp_path / "out"
    said = fails(capsys, "export", folder, "--format", "compressed-tensors", "-o", out)
    assert "8g32 cannot become" in said
    assert "--format dequantized" in said
    assert "no folder" in fails(capsys, "export", tmp_path / "absent", "--format", "auto-round", "-o", out)
    original = tiny_model("olmoe", dtype=torch.bfloat16)
    assert "not packed" in fails(capsys, "export", original, "--format", "auto-round", "-o", out)
    with pytest.raises(SystemExit):
        main(["export", str(folder), "--format", "exl2"])
    assert "invalid choice: 'exl2'" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
    out.mkdir()
    (out / "kept").touch()
    assert "exists already" in fails(capsys, "export", folder, "--format", "auto-round", "-o", out)
    assert [f.name for f in out.iterdir()] == ["kept"]


def test_fused_checkpoints_are_refused(tiny_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = packed(tiny_model, tmp_path, "granitemoe", "3g32")
    said = fails(capsys, "export", folder, "--format", "dequantized", "-o", tmp_path / "out")
    assert "several experts" in said
    assert not (tmp_path / "out").exists()


def test_the_price_without_writing(tiny_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = packed(tiny_model, tmp_path, "olmoe", "3g32", "4g32")
    assert main(["export", str(folder), "--format", "compressed-tensors", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    out = exported(folder, tmp_path / "out", "compressed-tensors")
    assert found["price"]["after"] == pytest.approx(sum(t.nbytes for t in tensors(out).values()), rel=0.1)
    rows = {(row["precision"], row["stored"]) for row in found["matrices"]}
    # every layer is as wide as its 4-bit codes with zero points need
    assert rows == {(p, "int8, groups of 32") for p in ("3g32", "4g32", "8g32s")}
    price = found["price"]
    assert price["before"] == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert (price["mixed"], price["layers"], price["loss"], price["uniform"]) == (2, 2, None, None)


def test_the_price_is_predicted_and_measured(
    tiny_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original, folder, out = tiny_model("olmoe", dtype=torch.bfloat16), tmp_path / "packed", tmp_path / "out"
    few = ["--samples", "4", "--length", "64", "--levels", "2,3", "--group-size", "32", "--no-eval"]
    stats, made = tmp_path / "stats.json", tmp_path / "map.json"
    assert main(["analyze", str(original), "--metrics", "fisher_error", *few[:-1], "-o", str(stats)]) == 0
    assert main(["allocate", str(stats), "--budget", "3.2bpw", "-o", str(made)]) == 0
    assert main(["quantize", str(original), "-o", str(folder), "--map", str(made), "--method", "rtn", "--no-eval"]) == 0
    (folder / "mopeq" / "stats.json").write_bytes(stats.read_bytes())
    capsys.readouterr()
    assert main(["export", str(folder), "--format", "compressed-tensors", "-o", str(out), "--uniform", "model",
                 "--against", str(original), "--json"]) == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    note = read_manifest(folder).precisions.note
    assert found["price"]["loss"] == pytest.approx(note["predicted_loss"])
    assert found["price"]["uniform"] > found["price"]["loss"]
    assert found["kl"]["exported"][0] == pytest.approx(found["kl"]["packed"][0], rel=0.05)
    assert main(["export", str(folder), "--format", "gguf"]) == 0
    shown = capsys.readouterr().out
    assert "best map with one precision in a layer" in shown
    assert "--against measures what was written" in fails(
        capsys, "export", folder, "--format", "gguf", "--against", original
    )
