"""Published ``config.json`` files of DeepSeek-VL2 and MolmoE in the words of transformers.

Both authors' code leaves defaults out and has switches that transformers' decoders do not: the decoder is chosen by
them, what no decoder here computes is refused. A configuration that is in the words of transformers already, as
``save_pretrained`` writes it, passes unchanged. Sources: configuration_deepseek.py and modeling_deepseek_vl_v2.py of
deepseek-ai/DeepSeek-VL2, config_molmoe.py of allenai/MolmoE-1B-0924.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mopeq.errors import ModelError

__all__ = ["DEEPSEEK_VL2", "MOLMO", "deepseek_vl2", "molmo"]

Config = Mapping[str, Any]

DEEPSEEK_VL2 = "deepseek_vl_v2"
MOLMO = "molmo"
TOWER = "siglip_so400m_patch14_384"

_ABSENT = object()
_TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "moe_intermediate_size": 1407,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "n_shared_experts": None,
    "n_routed_experts": None,
    "num_experts_per_tok": None,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 1.0,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_dropout": 0.0,
    "pad_token_id": None,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
}
"""What the published class takes where a key is absent; transformers' classes of these decoders take other values."""
_LATENT_DEFAULTS: dict[str, Any] = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
_TEXT_FIXED: dict[str, tuple[Any, Any]] = {
    "hidden_act": ("silu", "silu"),
    "moe_layer_freq": (1, 1),
    "attention_bias": (False, False),
    "rope_scaling": (None, None),
    "tie_word_embeddings": (False, False),
    "lm_head": (True, True),
    "rm_head": (False, False),
}
"""``{key: (the published default, the only value that is understood)}``; the tables below are alike."""
_VISION_FIXED = {
    "ignore_head": (True, True),
    "class_token": (False, False),
    "global_pool": ("map", "map"),
}
_PROJECTOR_FIXED = {
    "projector_type": ("downsample_mlp_gelu", "downsample_mlp_gelu"),
    "depth": (2, 2),
    "mlp_ratio": (1, 1),
}
_ROUTERS = {
    # (use_mla, scoring_func, topk_method, norm_topk_prob): transformers' decoder that routes so
    (False, "softmax", "greedy", False): "deepseek_ocr2_text",
    (True, "softmax", "greedy", False): "deepseek_v2",
    (True, "sigmoid", "noaux_tc", True): "deepseek_v3",
}


def deepseek_vl2(config: Config) -> dict[str, Any]:
    """A DeepSeek-VL2 configuration with ``text_config`` and ``vision_config`` in the words of transformers.

    Raises :class:`ModelError` for a decoder, tower, projector or tile layout that is not one of the published models'.
    """
    if "text_config" in config:
        return dict(config)
    text, vision, projector = (_part(config, f"{name}_config") for name in ("language", "vision", "projector"))
    _check("", config, {"tile_tag": ("2D", "2D"), "global_view_pos": ("head", "head")})
    width = _number(vision, "width", 1152)
    if (tower := vision.get("model_name")) != TOWER:
        raise ModelError(
            f"config.json has the tower {tower!r} in vision_config; expected {TOWER!r}, DeepSeek-VL2's; this is "
            "another model that goes by its name, as DeepSeek-OCR does: load it under transformers' own"
        )
    _check("vision_config.", vision, _VISION_FIXED)
    _check("projector_config.", projector, _PROJECTOR_FIXED)
    translated = _deepseek_text(text)
    for key, meant in (("input_dim", width), ("n_embed", translated["hidden_size"])):
        if projector.get(key, _ABSENT) != meant:
            raise _refused(f"projector_config.{key}", projector.get(key, _ABSENT), meant)
    return {
        **{k: v for k, v in config.items() if k not in ("language_config", "projector_config")},
        "text_config": translated,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": width,
            "intermediate_size": int(width * _real(vision, "mlp_ratio", 3.7362)),
            "num_hidden_layers": _number(vision, "layers", 27),
            "num_attention_heads": _number(vision, "heads", 16),
            "image_size": _number(vision, "image_size", 384),
            "patch_size": _number(vision, "patch_size", 14),
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "vision_use_head": False,
        },
        "downsample_ratio": _number(projector, "downsample_ratio", 2),
        "tie_word_embeddings": False,
    }


def _deepseek_text(text: Config) -> dict[str, Any]:
    """The decoder's part; transformers' routers ignore what they do not compute, so the class must fit exactly."""
    _check("language_config.", text, _TEXT_FIXED)
    latent = bool(text.get("use_mla", True))
    routing = (
        latent,
        text.get("scoring_func", "softmax"),
        text.get("topk_method", "gready"),  # the published default, which the published code refuses as well
        bool(text.get("norm_topk_prob", False)),
    )
    if routing not in _ROUTERS:
        found = ", ".join(
            f"{k} = {v!r}"
            for k, v in zip(("use_mla", "scoring_func", "topk_method", "norm_topk_prob"), routing, strict=True)
        )
        raise ModelError(
            f"config.json has {found} in language_config; expected what DeepSeek-VL2 tiny, small or base has; "
            "use the model's own config.json"
        )
    for key in ("n_group", "topk_group"):
        if text.get(key) not in (None, 1):
            raise _refused(f"language_config.{key}", text[key], 1)
    made = {key: text.get(key, default) for key, default in _TEXT_DEFAULTS.items()}
    heads = text.get("num_key_value_heads", made["num_attention_heads"])
    if heads is None:
        heads = made["num_attention_heads"]
    if heads != made["num_attention_heads"]:
        raise _refused("language_config.num_key_value_heads", heads, made["num_attention_heads"])
    for key in ("n_shared_experts", "n_routed_experts", "num_experts_per_tok", "num_hidden_layers"):
        _number(made, key)
    _number(made, "first_k_dense_replace", least=0)
    if latent:
        made |= {key: text.get(key, default) for key, default in _LATENT_DEFAULTS.items()}
    model_type = _ROUTERS[routing]
    dense = made["first_k_dense_replace"]
    if model_type == "deepseek_ocr2_text":
        made["mlp_layer_types"] = ["dense" if i < dense else "sparse" for i in range(made["num_hidden_layers"])]
    if model_type == "deepseek_v3":
        made |= {"num_nextn_predict_layers": 0, "rope_interleave": True, "norm_topk_prob": True}
    else:
        made["topk_method"] = "greedy"
    return {
        **made,
        "model_type": model_type,
        "num_key_value_heads": heads,
        "n_group": 1,
        "topk_group": 1,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }


_MOLMO_FIXED: dict[str, Any] = {
    "block_type": "moe",
    "moe_shared_expert": False,
    "moe_interleave": False,
    "moe_mlp_impl": "sparse",
    "activation_type": "swiglu",
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "attention_layer_norm": True,
    "attention_layer_norm_with_affine": True,
    "norm_after": False,
    "include_bias": False,
    "qkv_bias": False,
    "bias_for_layer_norm": False,
    "rope": True,
    "rope_impl": "llama",
    "alibi": False,
    "multi_query_attention": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "scale_logits": False,
    "weight_tying": False,
    "normalize_input_embeds": False,
    "use_position_ids": True,
    "image_pooling_2d": "attention-meanq",
    "image_projector": "mlp",
    "image_padding_embed": "pad_and_partial_pad",
    "use_cls_feature": False,
}
"""What MolmoE-1B-0924 has, and the only values that are understood; the published class's defaults are other ones."""


def molmo(config: Config) -> dict[str, Any]:
    """A MolmoE configuration with ``text_config`` and ``vision_config`` in the words of transformers.

    Raises :class:`ModelError` for a dense Molmo and for switches that MolmoE-1B-0924 does not have.
    """
    if "text_config" in config:
        return dict(config)
    if config.get("block_type") != "moe":
        raise ModelError(
            f"this molmo has block_type {config.get('block_type')!r}, it is dense; expected 'moe', a MolmoE; "
            "mopeq quantizes Mixture-of-Experts models"
        )
    for key, meant in _MOLMO_FIXED.items():
        found = config.get(key, None if meant is None else _ABSENT)
        if found != meant:
            raise _refused(key, found, meant)
    vit = _part(config, "vision_backbone")
    width, heads = _number(config, "d_model"), _number(config, "n_heads")
    for key, meant in (("n_kv_heads", heads), ("head_dim", width // heads)):
        if config.get(key) not in (None, meant):
            raise _refused(key, config[key], meant)
    inner = config.get("mlp_hidden_size") or _number(config, "mlp_ratio") * width
    vision = _molmo_vision(vit)
    layers, pooling = config.get("vit_layers"), [_number(config, f"image_pooling_{axis}") for axis in "hw"]
    depth, side = vision["num_hidden_layers"], vision["image_size"] // vision["patch_size"]
    if not isinstance(layers, list) or not all(type(n) is int and -depth <= n < 0 for n in layers):
        raise _expected("vit_layers", layers, f"negative numbers of the tower's {depth} blocks")
    if any(side % n for n in pooling):
        raise _expected("image_pooling_h and _w", pooling, f"divisors of the {side} patches of a side")
    rows = config.get("embedding_size") or _number(config, "vocab_size")
    return {
        "model_type": MOLMO,
        **{k: config[k] for k in ("architectures", "dtype", "torch_dtype", "quantization_config") if k in config},
        "text_config": {
            "model_type": "olmoe",
            "vocab_size": rows + _number(config, "additional_vocab_size", least=0),
            "hidden_size": width,
            "intermediate_size": inner // 2,
            "num_hidden_layers": _number(config, "n_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "num_experts": _number(config, "moe_num_experts"),
            "num_experts_per_tok": _number(config, "moe_top_k"),
            "norm_topk_prob": False,
            "hidden_act": "silu",
            "rms_norm_eps": _real(config, "layer_norm_eps"),
            "rope_theta": _real(config, "rope_theta"),
            "clip_qkv": config.get("clip_qkv"),
            "max_position_embeddings": config.get("max_position_embeddings") or _number(config, "max_sequence_length"),
            "pad_token_id": config.get("pad_token_id"),
            "bos_token_id": config.get("bos_token_id"),
            "eos_token_id": config.get("eos_token_id"),
            "tie_word_embeddings": False,
        },
        "vision_config": vision,
        "head_rows": rows,
        "vit_layers": layers,
        "image_pooling_size": pooling,
        "tie_word_embeddings": False,
    }


def _molmo_vision(vit: Config) -> dict[str, Any]:
    """The tower's part: an OpenAI CLIP without its class projection."""
    width, heads = _number(vit, "image_emb_dim"), _number(vit, "image_num_heads")
    sizes, patch = vit.get("image_default_input_size"), _number(vit, "image_patch_size")
    if not isinstance(sizes, list) or len(sizes) != 2 or type(sizes[0]) is not int or sizes[0] != sizes[1]:
        raise _expected("vision_backbone.image_default_input_size", sizes, "two equal whole numbers")
    for key, meant in {
        "image_model_type": "openai",
        "image_num_key_value_heads": heads,
        "image_head_dim": width // heads,
        "image_pos_patch_size": patch,
        "image_mlp_activations": "quick_gelu",
        "image_num_pos": (sizes[0] // patch) ** 2 + 1,
    }.items():
        if vit.get(key, _ABSENT) != meant:
            raise _refused(f"vision_backbone.{key}", vit.get(key, _ABSENT), meant)
    return {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": _number(vit, "image_mlp_dim"),
        "num_hidden_layers": _number(vit, "image_num_layers"),
        "num_attention_heads": heads,
        "image_size": sizes[0],
        "patch_size": patch,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": _real(vit, "image_norm_eps"),
    }


def _part(config: Config, name: str) -> Config:
    part = config.get(name)
    if not isinstance(part, Mapping):
        raise ModelError(f"config.json has no {name}; expected the published one; use the model's own config.json")
    return part


def _number(config: Config, name: str, default: object = _ABSENT, least: int = 1) -> int:
    value = config.get(name, default)
    if type(value) is not int or value < least:
        raise _expected(name, value, f"a whole number from {least} on")
    return value


def _real(config: Config, name: str, default: object = _ABSENT) -> float:
    value = config.get(name, default)
    if not isinstance(value, int | float) or not value > 0:
        raise _expected(name, value, "a number above 0")
    return float(value)


def _check(where: str, part: Config, table: Mapping[str, tuple[Any, Any]]) -> None:
    for key, (default, meant) in table.items():
        found = part.get(key, default)
        if found != meant:
            raise _refused(where + key, found, meant)


def _refused(key: str, found: object, meant: object) -> ModelError:
    return _expected(key, found, f"{meant!r}, all that this mopeq computes")


def _expected(key: str, found: object, phrase: str) -> ModelError:
    have = f"no {key}" if found is _ABSENT else f"{key} = {found!r}"
    return ModelError(f"config.json has {have}; expected {phrase}; use the model's own config.json")
