"""Checkpoints of random weights have the tensors of the published models."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
import torch
from test_published import headers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from mopeq.adapters import describe, inventory_of
from mopeq.load import load_processor
from mopeq.source import open_source, read_tensor
from published_shapes import CONFIGS, cut, shapes
from random_checkpoint import write, write_words


@pytest.mark.parametrize(
    ("name", "size", "parameters"),
    [
        ("deepseek-vl2-tiny", "tiny", 3_370_501_440),
        ("deepseek-vl2-small", "small", 16_148_349_504),
        ("deepseek-vl2", "base", 27_480_134_248),
        ("molmoe-1b", "molmoe", 7_221_875_712),
    ],
)
def test_names_and_shapes_of_models_with_images(name: str, size: str, parameters: int, tmp_path: Path) -> None:
    """Those of the classes that load the published files; the sums counted in the authors' modules."""
    made = shapes(CONFIGS[name])
    assert made == headers(size, tmp_path).shapes
    assert sum(map(prod, made.values())) == parameters


@pytest.mark.parametrize(("name", "parameters"), [("olmoe-1b-7b", 6_919_161_856), ("qwen3-30b-a3b", 30_532_122_624)])
def test_names_and_shapes_of_text_models(name: str, parameters: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    made = shapes(CONFIGS[name])
    assert made == {k: tuple(t.shape) for k, t in revert_weight_conversion(model, model.state_dict()).items()}
    assert sum(map(prod, made.values())) == parameters


@pytest.mark.parametrize("name", CONFIGS)
def test_folder_of_headers(name: str, tmp_path: Path) -> None:
    """A cut model is described, its processor loads, and its weights take no room on the disk."""
    folder = tmp_path / name
    write(folder, cut(CONFIGS[name], 2), torch.bfloat16, seed=None)
    write_words(name, folder)
    source = open_source(folder)
    spec = describe(source)
    assert inventory_of(source, spec).parameters == sum(map(prod, source.shapes.values())) - _dropped(name)
    assert spec.layers[-1].index == 1
    assert sum(512 * file.stat().st_blocks for file in folder.iterdir()) < 2_000_000
    if "vision_config" in CONFIGS[name] or "vision_backbone" in CONFIGS[name]:
        assert load_processor(folder).image_token_ids


def _dropped(name: str) -> int:
    """Weights of the pooling head that no model uses."""
    return 15_238_352 if name.startswith("deepseek") else 0


def test_weights_are_drawn_once_and_norms_keep_activations(tmp_path: Path) -> None:
    config = {**CONFIGS["olmoe-1b-7b"], "hidden_size": 64, "intermediate_size": 32, "vocab_size": 512,
              "num_experts": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2}  # fmt: skip
    for name, most in (("whole", 1 << 30), ("parts", 30_000)):
        write(tmp_path / name, config, torch.bfloat16, seed=3, shard_bytes=most)
    whole, parts = (open_source(tmp_path / name) for name in ("whole", "parts"))
    assert len(set(whole.files.values())) == 1 < len(set(parts.files.values()))
    for key in whole.shapes:
        assert torch.equal(read_tensor(whole, key), read_tensor(parts, key))
    assert bool((read_tensor(whole, "model.norm.weight") == 1).all())
    weight = read_tensor(whole, "lm_head.weight").float()
    assert 0.9 / 64 < float(weight.var()) < 1.1 / 64
