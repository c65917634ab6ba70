"""Mixture-of-Experts vision-language models that transformers has itself, quantized, loaded and run with an image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

import packing
import tiny
from mopeq.adapters import describe
from mopeq.analyze.observe import observe
from mopeq.load import load, load_original
from mopeq.runtime.decode import Sampling, decode
from mopeq.source import open_source
from mopeq.stream import Shell, Store, backward, forward

Make = Callable[..., Path]
DRAW = torch.Generator().manual_seed(5)


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=DRAW)


def prompt(token: int, count: int, before: tuple[int, ...] = (), after: tuple[int, ...] = ()) -> dict[str, Tensor]:
    ids = torch.tensor([[7, 8, *before, *[token] * count, *after, 9, 10, 11]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


GRID = torch.tensor([[1, 4, 4]])
INPUTS: dict[str, tuple[int, dict[str, Any]]] = {
    # a model's image token, and its inputs: one image of 16 x 16 pixels, 4 x 4 patches, 4 tokens unless said otherwise
    "aria": (259, {**prompt(259, 4), "pixel_values": image(1, 3, 16, 16)}),
    "deepseek_ocr2": (259, {**prompt(259, 145), "pixel_values": image(1, 3, 16, 16)}),  # 144 queries and an end
    "ernie4_5_vl_moe": (259, {
        **prompt(259, 4, (260,), (261,)), "pixel_values": image(16, 3 * 4 * 4), "image_grid_thw": GRID,
        "mm_token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]]),
        "moe_mm_token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0]]),
    }),
    "glm46v": (259, {
        **prompt(259, 4, (260,), (261,)), "pixel_values": image(16, 3 * 2 * 4 * 4), "image_grid_thw": GRID,
        "mm_token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]]),
    }),
    "glm4v_moe": (259, {
        **prompt(259, 4, (260,), (261,)), "pixel_values": image(16, 3 * 2 * 4 * 4), "image_grid_thw": GRID,
        "mm_token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]]),
    }),
    "internvl": (259, {**prompt(259, 4), "pixel_values": image(1, 3, 16, 16)}),
    "kimi_k25": (259, {**prompt(259, 4), "pixel_values": image(16, 3, 4, 4), "image_grid_thw": GRID}),
    "llama4": (259, {**prompt(259, 4), "pixel_values": image(1, 3, 16, 16)}),
    "qwen3_5_moe": (259, {
        **prompt(259, 4, (260,), (261,)), "pixel_values": image(16, 3 * 2 * 4 * 4), "image_grid_thw": GRID,
        "mm_token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]]),
    }),
    "qwen3_vl_moe": (259, {
        **prompt(259, 4), "pixel_values": image(16, 3 * 2 * 4 * 4), "image_grid_thw": GRID,
        "mm_token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0]]),
    }),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("family", INPUTS)
def test_with_an_image(family: str, tiny_model: Make, tmp_path: Path) -> None:
    """Packed and dequantized weights give the same logits and the same continuation, and the image matters."""
    original = tiny_model(family)
    packing.pack_model(original, tmp_path / "packed")
    dense = AutoModelForImageTextToText.from_pretrained(
        packing.dequantized(original, tmp_path / "packed", tmp_path / "dense"), dtype=torch.float32
    )
    model = load(tmp_path / "packed", dtype=torch.float32)
    _, inputs = INPUTS[family]
    got, want = model(**inputs).logits, dense(**inputs).logits
    assert (got - want).norm() / want.norm() < 1e-5
    other = dense(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
    assert (other - want).norm() / want.norm() > 1e-2
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": tiny.PAD, "eos_token_id": None}
    assert torch.equal(model.generate(**inputs, **settings), dense.generate(**inputs, **settings))
    stored = tiny.tensors(tmp_path / "packed")
    towers = [ref.key for ref in describe(open_source(original)).kept if ref.group in ("vision", "projector")]
    assert towers
    assert all(stored[key].dtype == torch.bfloat16 for key in towers)


@torch.no_grad()
@pytest.mark.parametrize("family", INPUTS)
def test_decoding_one_prompt_after_another(family: str, tiny_model: Make) -> None:
    """An image's positions, which some models keep, are not the next prompt's."""
    model = load_original(tiny_model(family))
    _, inputs = INPUTS[family]
    text = prompt(33, 3)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tiny.PAD, "eos_token_id": None}
    wanted = [model.generate(**given, **settings)[0, given["input_ids"].shape[1] :] for given in (inputs, text)]
    for given, want in zip((inputs, text), wanted, strict=True):
        images = {name: value for name, value in given.items() if name not in ("input_ids", "attention_mask")}
        assert list(decode(model, given["input_ids"], 6, frozenset(), Sampling(), images)) == want.tolist()


@pytest.mark.parametrize("family", INPUTS)
def test_image_tokens_are_told_apart(family: str, tiny_model: Make) -> None:
    token, inputs = INPUTS[family]
    spec = describe(open_source(tiny_model(family)))
    model = AutoModelForImageTextToText.from_pretrained(tiny_model(family), dtype=torch.float32)
    modality = (inputs["input_ids"] == token).long()
    routed = observe(model, spec, [{**inputs, "modality": modality}], gradients=True)
    for layer in spec.layers:
        seen = routed[layer.index]
        assert seen.vision is not None
        assert seen.vision.tolist() == modality[0].bool().tolist()
        assert seen.gradient is not None
        assert bool((seen.gradient[seen.vision] != 0).any()) == (layer.for_images or not layer.dealer)


@pytest.mark.parametrize("family", INPUTS)
def test_layer_by_layer_is_the_whole_model(family: str, tiny_model: Make) -> None:
    """With an image, whose features some models add between layers: bit for bit, gradients included."""
    source = open_source(tiny_model(family))
    token, inputs = INPUTS[family]
    batches = [{**inputs, "modality": (inputs["input_ids"] == token).long()}]
    spec = describe(source)
    model = AutoModelForImageTextToText.from_pretrained(source.path, dtype=torch.float32)
    wanted = observe(model, spec, batches, gradients=True)
    shell = Shell(source, spec)
    for sweep in (forward(shell, batches, Store()), backward(shell, batches, Store())):
        for layer, _, seen in sweep:
            whole = wanted[layer.index]
            assert torch.equal(seen.hidden, whole.hidden)
            assert torch.equal(seen.index, whole.index)
            assert seen.vision is not None
            assert whole.vision is not None
            assert torch.equal(seen.vision, whole.vision)
            assert seen.gradient is None or torch.equal(seen.gradient, whole.gradient)  # type: ignore[arg-type]


def test_every_native_family_is_here() -> None:
    assert set(INPUTS) == set(tiny.VLM) - {"deepseek_vl_v2", "molmo"}
