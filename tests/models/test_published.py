"""Published configurations: which decoder they mean, their defaults, what is refused, and full-size models."""

from __future__ import annotations

import copy
import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.core_model_loading import revert_weight_conversion

from mopeq.adapters import describe, groups_table, inventory_of
from mopeq.errors import ModelError
from mopeq.models.published import deepseek_vl2, molmo
from mopeq.source import Source
from reference import DEEPSEEK, FOLDER, MOLMOE, NAMES

MLA = {"kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
LANGUAGES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 1280, "num_hidden_layers": 12, "num_attention_heads": 10, "num_key_value_heads": 10,
        "vocab_size": 129280, "intermediate_size": 6848, "moe_intermediate_size": 896, "n_routed_experts": 64,
        "use_mla": False, "kv_lora_rank": None, "q_lora_rank": None, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0,
        "v_head_dim": 0, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
    },
    "small": {
        **MLA, "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
        "vocab_size": 102400, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64,
        "topk_method": "greedy",
    },
    "base": {  # layers, heads and the ranks of attention are the class's defaults
        "hidden_size": 2560, "vocab_size": 129280, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "n_routed_experts": 72, "q_lora_rank": None, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "norm_topk_prob": True, "routed_scaling_factor": 2.0, "n_group": 1, "topk_group": 1,
    },
}  # fmt: skip


def full_size(size: str) -> dict[str, Any]:
    """The published ``config.json`` as far as it matters here."""
    if size == "molmoe":
        config = json.loads((FOLDER / MOLMOE / "config.json").read_text())
        vision = {
            **config["vision_backbone"],
            **{"image_default_input_size": [336, 336], "image_patch_size": 14, "image_pos_patch_size": 14},
            **{"image_emb_dim": 1024, "image_num_heads": 16, "image_num_key_value_heads": 16, "image_head_dim": 64},
            **{"image_num_layers": 23, "image_mlp_dim": 4096, "image_num_pos": 577},
        }
        sizes = {"d_model": 2048, "n_layers": 16, "n_heads": 16, "moe_num_experts": 64, "moe_top_k": 8}
        rows = {"vocab_size": 50280, "embedding_size": 50304, "additional_vocab_size": 128}
        return {**config, **sizes, **rows, "vision_backbone": vision}
    language = {"n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, **LANGUAGES[size]}
    return {
        "model_type": "deepseek_vl_v2",
        "torch_dtype": "bfloat16",
        "tile_tag": "2D",
        "global_view_pos": "head",
        "language_config": {"model_type": "deepseek_v2", **language},
        "projector_config": {"n_embed": language["hidden_size"], "input_dim": 1152},
        "vision_config": {"model_name": "siglip_so400m_patch14_384", "layers": 27, "width": 1152, "mlp_ratio": 3.7362},
    }


POOLING = {"latent": (1, 1, 1152), "q.weight": (1152, 1152), "q.bias": (1152,), "kv.weight": (2304, 1152),
           "kv.bias": (2304,), "proj.weight": (1152, 1152), "proj.bias": (1152,), "norm.weight": (1152,),
           "norm.bias": (1152,), "mlp.fc1.weight": (4304, 1152), "mlp.fc1.bias": (4304,),
           "mlp.fc2.weight": (1152, 4304), "mlp.fc2.bias": (1152,)}  # fmt: skip
"""The published tower's pooling head, which the models store and never call."""


def headers(size: str, tmp_path: Path) -> Source:
    """What opening the published folder would give: its configuration, names, shapes and types, and no weights."""
    config = full_size(size)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path))
    shapes = {k: tuple(t.shape) for k, t in revert_weight_conversion(model, model.state_dict()).items()}
    if size != "molmoe":
        shapes |= {f"vision.attn_pool.{name}": shape for name, shape in POOLING.items()}
    kind = "F32" if size == "molmoe" else "BF16"
    return Source(tmp_path, config, shapes, dict.fromkeys(shapes, kind), dict.fromkeys(shapes, "model.safetensors"))


@pytest.mark.parametrize(
    ("size", "parameters", "experts", "tensors", "layers"),
    [
        ("tiny", 3_370_501_440, 2_422_210_560, 2582, range(1, 12)),
        ("small", 16_148_349_504, 14_394_851_328, 5639, range(1, 27)),
        ("base", 27_480_134_248, 24_631_050_240, 6973, range(1, 30)),
        ("molmoe", 7_221_875_712, 6_442_450_944, 3573, range(16)),
    ],
)
def test_full_size(size: str, parameters: int, experts: int, tensors: int, layers: range, tmp_path: Path) -> None:
    """Totals counted in the published code's own modules; every tensor is accounted for."""
    source = headers(size, tmp_path)
    spec = describe(source)
    rows = {row.group: row for row in groups_table(spec, source)}
    assert sum(row.parameters for row in rows.values()) == parameters
    assert sum(prod(shape) for shape in source.shapes.values()) == parameters
    assert rows["routed_experts"].parameters == experts == inventory_of(source, spec).expert_parameters
    assert len(source.shapes) == tensors
    assert [layer.index for layer in spec.layers] == [*layers]
    assert rows["vision"].treatment == rows["projector"].treatment == "kept"
    assert ("ignored" in rows) == (size != "molmoe")
    if size != "molmoe":
        assert rows["ignored"].parameters == 15_238_352


@pytest.mark.parametrize(
    ("name", "decoder"), [*zip(NAMES, ("deepseek_ocr2_text", "deepseek_v2", "deepseek_v3", "olmoe"), strict=True)]
)
def test_decoder_and_round_trip(name: str, decoder: str, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(FOLDER / name)
    assert config.text_config.model_type == decoder
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()


def test_defaults_are_the_published_ones() -> None:
    text = deepseek_vl2(full_size("base"))["text_config"]
    assert (text["num_hidden_layers"], text["num_attention_heads"], text["kv_lora_rank"]) == (30, 32, 512)
    vision = deepseek_vl2(full_size("base"))["vision_config"]
    assert (vision["intermediate_size"], vision["num_attention_heads"]) == (4304, 16)


def test_defaults_without_a_published_file() -> None:
    """transformers makes such ones to compare with."""
    for kind in ("deepseek_vl_v2", "molmo"):
        config = AutoConfig.for_model(kind)
        assert config.text_config is not None


def changed(config: dict[str, Any], where: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    *path, last = where.split(".")
    target = config
    for name in path:
        target = target[name]
    if value is None:
        del target[last]
    else:
        target[last] = value
    return config


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        ("tile_tag", "1D", "tile_tag = '1D'; expected '2D', all that"),
        ("global_view_pos", "tail", "global_view_pos = 'tail'"),
        ("language_config", None, "no language_config"),
        ("projector_config", None, "no projector_config"),
        ("language_config.topk_method", None, "topk_method = 'gready'"),
        (
            "language_config.topk_method",
            "noaux_tc",
            "use_mla = False, scoring_func = 'softmax', topk_method = 'noaux_tc'",
        ),
        ("language_config.scoring_func", "sigmoid", "scoring_func = 'sigmoid'"),
        ("language_config.norm_topk_prob", True, "norm_topk_prob = True"),
        ("language_config.n_group", 2, "language_config.n_group = 2"),
        ("language_config.num_key_value_heads", 2, "language_config.num_key_value_heads = 2"),
        ("language_config.n_routed_experts", None, "n_routed_experts = None; expected a whole number from 1 on"),
        ("language_config.hidden_act", "gelu", "language_config.hidden_act = 'gelu'"),
        ("language_config.moe_layer_freq", 2, "language_config.moe_layer_freq = 2"),
        ("language_config.rope_scaling", {"type": "yarn"}, "language_config.rope_scaling"),
        ("language_config.tie_word_embeddings", True, "tie_word_embeddings = True"),
        (
            "vision_config.model_name",
            "deeplip_b_l",
            "the tower 'deeplip_b_l' in vision_config; .* as DeepSeek-OCR does",
        ),
        ("projector_config.projector_type", "linear", "projector_config.projector_type = 'linear'"),
        ("vision_config.width", "wide", "width = 'wide'; expected a whole number"),
        ("projector_config.depth", 3, "projector_config.depth = 3"),
        ("projector_config.n_embed", 65, "projector_config.n_embed = 65; expected 64,"),
        ("projector_config.input_dim", None, "no projector_config.input_dim"),
    ],
)
def test_deepseek_that_is_not_computed(where: str, value: Any, words: str, tmp_path: Path) -> None:
    refused(DEEPSEEK[0], where, value, words, tmp_path)


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        ("block_type", "sequential", "block_type 'sequential', it is dense"),
        ("rope_impl", None, "no rope_impl; expected 'llama'"),
        ("norm_after", True, "norm_after = True"),
        ("n_kv_heads", 2, "n_kv_heads = 2; expected 4,"),
        ("moe_shared_expert", True, "moe_shared_expert = True"),
        ("attn_logit_softcapping", 50.0, "attn_logit_softcapping = 50.0"),
        ("image_pooling_2d", "attention", "image_pooling_2d = 'attention'"),
        ("image_pooling_h", 5, r"image_pooling_h and _w = \[5, 2\]"),
        ("vit_layers", [1, -2], r"vit_layers = \[1, -2\]"),
        ("d_model", None, "no d_model"),
        ("vision_backbone.image_model_type", "siglip", "vision_backbone.image_model_type = 'siglip'"),
        ("vision_backbone.image_num_layers", None, "no image_num_layers; expected a whole number"),
        ("vision_backbone.image_default_input_size", [84, 70], "expected two equal whole numbers"),
        ("layer_norm_eps", "small", "layer_norm_eps = 'small'; expected a number above 0"),
        ("vision_backbone.image_num_pos", 144, "vision_backbone.image_num_pos = 144"),
    ],
)
def test_molmo_that_is_not_computed(where: str, value: Any, words: str, tmp_path: Path) -> None:
    refused(MOLMOE, where, value, words, tmp_path)


def refused(name: str, where: str, value: Any, words: str, folder: Path) -> None:
    """By the specification and by transformers, with the same sentence."""
    config = changed(json.loads((FOLDER / name / "config.json").read_text()), where, value)
    with pytest.raises(ModelError, match=words) as caught:
        (molmo if name == MOLMOE else deepseek_vl2)(config)
    assert str(caught.value).endswith(
        ("use the model's own config.json", "quantizes Mixture-of-Experts models", "under transformers' own")
    )
    (folder / "config.json").write_text(json.dumps(config))
    if where not in ("language_config", "d_model"):
        with pytest.raises(ModelError, match=words):
            AutoConfig.from_pretrained(folder)
