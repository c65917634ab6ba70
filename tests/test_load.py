"""From a folder to a model: packed ones, original ones, and what cannot be loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mopeq
import packing
import tiny
from mopeq.errors import CheckpointError, ModelError
from mopeq.load import is_packed, load, load_original, load_tokenizer
from mopeq.precision import Precision, PrecisionMap
from mopeq.runtime import packed_modules

IDS = torch.arange(8)[None] + 40


@pytest.fixture
def packed(tmp_path: Path, tiny_model: Callable[..., Path]) -> Path:
    packing.pack_model(tiny_model("olmoe"), tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("family", ["olmoe", "qwen3_vl_moe", "llama4", "llama4_text"])
@torch.no_grad()
def test_right_class(family: str, tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    original = tiny_model(family)
    packing.pack_model(original, tmp_path / "packed")
    model, plain = load(tmp_path / "packed"), load_original(original)
    assert type(model) is type(plain)
    assert type(model).__name__ == json.loads((original / "config.json").read_text())["architectures"][0]
    assert not model.training
    assert not plain.training
    assert packed_modules(model)
    assert not packed_modules(plain)


@torch.no_grad()
def test_dtype_and_device(packed: Path, tiny_model: Callable[..., Path]) -> None:
    assert load(packed).dtype == torch.float32  # as config.json says
    for dtype in (torch.bfloat16, torch.float32):
        model = load(str(packed), dtype=dtype, device="cpu")
        assert model.dtype == dtype
        assert model(IDS).logits.dtype == dtype
    original = load_original(tiny_model("olmoe"), torch.bfloat16, attn_implementation="eager",
                             experts_implementation="eager", device=torch.device("cpu"))  # fmt: skip
    assert original.config._attn_implementation == "eager"
    assert original.config._experts_implementation == "eager"
    assert original.dtype == torch.bfloat16


@torch.no_grad()
def test_linears_that_fit_nothing_stay_at_16_bits(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """A vocabulary that is no multiple of 8: the head is an ordinary linear in bfloat16."""
    original = tiny_model("olmoe", vocab_size=267)
    precisions = PrecisionMap.uniform({0: 8, 1: 8}, Precision(4, 32))
    packing.pack_model(original, tmp_path / "packed", precisions)
    assert tiny.tensors(tmp_path / "packed")["lm_head.weight"].dtype == torch.bfloat16
    model = load(tmp_path / "packed")
    assert type(model.lm_head) is torch.nn.Linear
    dense = load_original(packing.dequantized(original, tmp_path / "packed", tmp_path / "dense"))
    assert torch.allclose(model(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)


def test_is_packed(packed: Path, tiny_model: Callable[..., Path]) -> None:
    assert is_packed(packed)
    assert is_packed(str(packed))
    assert not is_packed(tiny_model("olmoe"))


def test_wrong_way_round(packed: Path, tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=r"is a packed checkpoint; .*load it with mopeq\.load"):
        load_original(packed)
    with pytest.raises(CheckpointError, match="this model is not packed; pack it with mopeq quantize"):
        load(tiny_model("olmoe"))


@pytest.mark.parametrize("function", [load, load_original, load_tokenizer, is_packed])
def test_nothing_there(function: Callable[[Any], Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        function(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="nobody/nothing"):
        function("nobody/nothing")


def test_broken_configuration(packed: Path, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    (packed / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        load(packed)
    original = tiny.save_tiny("olmoe", tmp_path / "original")
    (original / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot read the configuration of"):
        load_original(original)


def test_every_weight_comes_from_the_files(packed: Path, tmp_path: Path) -> None:
    """transformers would initialise what is missing at random and drop what is left over."""
    norm = "model.layers.0.input_layernorm.weight"
    saved = tiny.tensors(packed)[norm]
    tiny.rewrite(packed, {norm: None})
    with pytest.raises(CheckpointError, match=rf"1 tensors are missing from the checkpoint, the first is {norm}"):
        load(packed)
    tiny.rewrite(packed, {norm: saved[:8].clone()})
    with pytest.raises(CheckpointError, match=r"transformers cannot load|is \[8\] in the checkpoint"):
        load(packed)
    tiny.rewrite(packed, {norm: saved, "model.extra.weight": saved.clone()})
    with pytest.raises(CheckpointError, match=r"1 tensors in it belong to no weight .*model\.extra\.weight"):
        load(packed)
    original = tiny.save_tiny("olmoe", tmp_path / "original")
    tiny.rewrite(original, {"model.extra.weight": saved})
    assert load_original(original).dtype == torch.float32  # transformers drops it, as with the original's own loader
    tiny.rewrite(original, {norm: None})
    with pytest.raises(ModelError, match=rf"1 tensors are missing from it, the first is {norm}"):
        load_original(original)


def test_no_weights_at_all(packed: Path) -> None:
    for file in packed.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="transformers cannot load"):
        load(packed)


def test_tokenizer(packed: Path) -> None:
    tokenizer = load_tokenizer(packed)
    assert tokenizer.decode(tokenizer("some text")["input_ids"]) == "some text"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (packed / name).unlink()
    with pytest.raises(ModelError, match=r"its vocabulary is empty; add tokenizer\.json"):
        load_tokenizer(packed)


def test_public_name_loads(packed: Path) -> None:
    assert packed_modules(mopeq.load(packed))
