"""GGUF files read back by the gguf package, and what such a file cannot say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from exporting import packed, with_merges

from mopeq.checkpoint import read_packed
from mopeq.cli import main
from mopeq.errors import InputError, ModelError
from mopeq.export import plan_export, write_export
from mopeq.export.gguf_blocks import WIDTHS, Block, blocks
from mopeq.export.gguf_words import SPLITTERS, _splitter
from mopeq.load import load_tokenizer
from mopeq.precision import Precision
from mopeq.qtensor import Codes, dequantize, pack
from tiny import edit_config

Make = Callable[..., Path]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("size", [32, 64, -1])
def test_blocks_are_those_of_gguf(bits: int, size: int) -> None:
    precision = Precision(bits, size, True)
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, precision.levels, (8, 128), generator=draw, dtype=torch.uint8)
    codes[:, :2] = torch.tensor([0, precision.levels - 1])
    matrix = pack(Codes(codes, torch.rand(8, precision.group_count(128), generator=draw).half(), None, precision))
    raw = blocks(matrix, bits)
    found = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[str(Block(bits))])
    assert torch.equal(torch.from_numpy(found), dequantize(matrix))
    assert raw.nbytes == Block(bits).nbytes(8, 128)


def test_every_stack_holds_its_experts_exactly(tiny_model: Make, tmp_path: Path) -> None:
    folder = with_merges(packed(tiny_model, tmp_path, "olmoe", "3g32", "2g64", "4g-1s"))
    size = write_export(plan_export(folder, "gguf"), tmp_path / "out.gguf")
    assert size == (tmp_path / "out.gguf").stat().st_size
    assert not list(tmp_path.glob("*.partial"))
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    for stack, matrix in (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")):
        tensor = found[f"blk.1.ffn_{stack}_exps.weight"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.Q4_0
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        for expert in range(8):
            name = f"model.layers.1.mlp.experts.{expert}.{matrix}"
            assert torch.equal(values[expert], dequantize(read_packed(folder, name)))
    assert found["blk.0.attn_q.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert found["blk.0.ffn_gate_inp.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    assert found["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.BF16


def test_types_follow_the_widest_of_a_stack(tiny_model: Make, tmp_path: Path) -> None:
    folder = packed(tiny_model, tmp_path, "olmoe", "4g32", "2g32")
    assert {str(s) for b, s in plan_export(folder, "gguf").stored.items() if ".experts." in b} == {"Q5_0"}
    assert {row.stored for row in plan_export(folder, "gguf").rows() if row.precision.bits == 2} == {"Q5_0"}


def test_what_a_stack_of_floats_costs_is_said(
    tiny_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = packed(tiny_model, tmp_path, "olmoe", "3g32", "8g32")
    assert main(["export", str(folder), "--format", "gguf", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["stored"] for row in found["matrices"] if row["precision"] == "3g32"} == {"16-bit floats"}
    assert found["price"]["after"] > 2 * found["price"]["before"]


def test_settings_and_words(tiny_model: Make, tmp_path: Path) -> None:
    folder = with_merges(packed(tiny_model, tmp_path, "qwen3_moe", "3g32", norm_topk_prob=True))
    write_export(plan_export(folder, "gguf"), tmp_path / "out.gguf")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    said = {name: field.contents() for name, field in fields.items()}
    assert said["general.architecture"] == "qwen3moe"
    assert (said["qwen3moe.expert_count"], said["qwen3moe.expert_used_count"]) == (8, 2)
    assert said["qwen3moe.attention.key_length"] == 16
    assert said["tokenizer.ggml.model"] == "gpt2"
    assert said["tokenizer.ggml.merges"] == ["t h", "th e", "Ġ a"]
    words = load_tokenizer(folder)
    tokens = said["tokenizer.ggml.tokens"]
    assert {tokens[number]: number for number in words.get_vocab().values()} == words.get_vocab()
    assert len(tokens) == 264
    control = [i for i, kind in enumerate(said["tokenizer.ggml.token_type"]) if kind == gguf.TokenType.CONTROL]
    assert control == sorted(words.all_special_ids)
    assert "assistant" in said["tokenizer.chat_template"]


def test_models_that_llama_cpp_computes_differently_are_refused(tiny_model: Make, tmp_path: Path) -> None:
    folder = packed(tiny_model, tmp_path, "olmoe", "3g32")
    edit_config(folder, norm_topk_prob=True)
    with pytest.raises(InputError, match="norm_topk_prob = True, which llama"):
        plan_export(folder, "gguf")
    other = packed(tiny_model, tmp_path / "b", "qwen2_moe", "3g32")
    with pytest.raises(InputError, match=r"MoE layers = \[0, 2\]"):
        plan_export(other, "gguf")
    with pytest.raises(InputError, match="no GGUF of deepseek_v3 models"):
        plan_export(packed(tiny_model, tmp_path / "c", "deepseek_v3", "3g32"), "gguf")


def test_a_tokenizer_without_merges_leaves_nothing(tiny_model: Make, tmp_path: Path) -> None:
    folder = packed(tiny_model, tmp_path, "olmoe", "3g32")
    with pytest.raises(ModelError, match="no merges"):
        write_export(plan_export(folder, "gguf"), tmp_path / "out.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["packed"]


def test_splitters_are_named_by_their_patterns() -> None:
    byte_level = {"type": "ByteLevel", "use_regex": False}
    for pattern, name in SPLITTERS.items():
        steps = [{"type": "Split", "pattern": {"Regex": pattern}}, byte_level]
        assert _splitter({"type": "Sequence", "pretokenizers": steps}, Path()) == name
    assert _splitter({"type": "ByteLevel"}, Path()) == "gpt-2"
    with pytest.raises(ModelError, match="cannot name for llama"):
        _splitter({"type": "Whitespace"}, Path())
