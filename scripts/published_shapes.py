"""Configurations of published models, and from them the name and shape of every tensor, in the order of the files.

Sources: the models' ``config.json``; for what DeepSeek-VL2 leaves to its class, and for names, the authors' code
(deepseek-ai/DeepSeek-VL2, allenai/MolmoE-1B-0924). Types are one a model: that in which it was published.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["CONFIGS", "FLOAT32", "PROCESSORS", "cut", "shapes"]

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

ROPE = {"rope_type": "default"}
LATENT = {"use_mla": True, "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
          "v_head_dim": 128}  # fmt: skip
PLAIN = {"use_mla": False, "q_lora_rank": None, "kv_lora_rank": None, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0,
         "v_head_dim": 0}  # fmt: skip
TILE = 384
TILES = [(1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (4, 1), (2, 2), (1, 5), (5, 1), (1, 6), (6, 1), (2, 3), (3, 2),
         (1, 7), (7, 1), (1, 8), (8, 1), (2, 4), (4, 2), (1, 9), (9, 1), (3, 3)]  # fmt: skip


def _deepseek(language: Config) -> Config:
    """A published DeepSeek-VL2 configuration."""
    shared = {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "n_shared_experts": 2,
              "num_experts_per_tok": 6, "first_k_dense_replace": 1, "max_position_embeddings": 4096, "n_group": 1,
              "topk_group": 1, "torch_dtype": "bfloat16"}  # fmt: skip
    return {
        "model_type": "deepseek_vl_v2", "torch_dtype": "bfloat16", "tile_tag": "2D", "global_view_pos": "head",
        "candidate_resolutions": [[TILE * w, TILE * h] for w, h in TILES], "language_config": {**shared, **language},
        "projector_config": {"model_type": "mlp_projector", "input_dim": 1152, "n_embed": language["hidden_size"]},
        "vision_config": {"model_type": "vision", "model_name": "siglip_so400m_patch14_384", "layers": 27,
                          "width": 1152, "mlp_ratio": 3.7362, "image_size": TILE, "patch_size": 14},
    }  # fmt: skip


CONFIGS: dict[str, Config] = {
    "olmoe-1b-7b": {
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024,
        "num_hidden_layers": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": 50304, "max_position_embeddings": 4096, "hidden_act": "silu",
        "norm_topk_prob": False, "tie_word_embeddings": False, "attention_bias": False, "rms_norm_eps": 1e-5,
        "rope_parameters": {**ROPE, "rope_theta": 10000.0}, "eos_token_id": 50279, "pad_token_id": 1,
        "dtype": "bfloat16",
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_experts": 128,
        "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "vocab_size": 151936, "max_position_embeddings": 40960, "hidden_act": "silu", "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False, "attention_bias": False,
        "rms_norm_eps": 1e-6, "rope_parameters": {**ROPE, "rope_theta": 1000000.0}, "eos_token_id": 151645,
        "bos_token_id": 151643, "dtype": "bfloat16",
    },
    "deepseek-vl2-tiny": _deepseek({
        **PLAIN, "hidden_size": 1280, "intermediate_size": 6848, "moe_intermediate_size": 896, "num_hidden_layers": 12,
        "num_attention_heads": 10, "num_key_value_heads": 10, "n_routed_experts": 64, "vocab_size": 129280,
        "topk_method": "greedy", "bos_token_id": 0, "eos_token_id": 1,
    }),
    "deepseek-vl2-small": _deepseek({
        **LATENT, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 64,
        "vocab_size": 102400, "topk_method": "greedy", "bos_token_id": 100000, "eos_token_id": 100001,
    }),
    "deepseek-vl2": _deepseek({
        **LATENT, "hidden_size": 2560, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 32, "num_key_value_heads": 32, "n_routed_experts": 72,
        "vocab_size": 129280, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
        "routed_scaling_factor": 2.0, "bos_token_id": 0, "eos_token_id": 1,
    }),
    "molmoe-1b": {
        "architectures": ["OLMoForCausalLM"], "model_type": "molmo", "d_model": 2048, "n_layers": 16, "n_heads": 16,
        "n_kv_heads": None, "mlp_ratio": 1, "moe_num_experts": 64, "moe_top_k": 8, "vocab_size": 50280,
        "embedding_size": 50304, "additional_vocab_size": 128, "max_position_embeddings": 32768,
        "max_sequence_length": 4096, "layer_norm_eps": 1e-5, "rope_theta": 10000.0, "block_type": "moe",
        "moe_shared_expert": False, "moe_interleave": False, "moe_mlp_impl": "sparse", "activation_type": "swiglu",
        "layer_norm_type": "rms", "layer_norm_with_affine": True, "attention_layer_norm": True,
        "attention_layer_norm_with_affine": True, "norm_after": False, "include_bias": False, "qkv_bias": False,
        "bias_for_layer_norm": False, "rope": True, "rope_impl": "llama", "alibi": False, "clip_qkv": None,
        "multi_query_attention": None, "attn_logit_softcapping": None, "final_logit_softcapping": None,
        "scale_logits": False, "weight_tying": False, "normalize_input_embeds": False, "use_position_ids": True,
        "image_pooling_2d": "attention-meanq", "image_pooling_h": 2, "image_pooling_w": 2, "image_projector": "mlp",
        "image_padding_embed": "pad_and_partial_pad", "use_cls_feature": False, "vit_layers": [-2, -9],
        "pad_token_id": 1, "eos_token_id": 50279, "bos_token_id": 50279,
        "vision_backbone": {
            "image_model_type": "openai", "image_default_input_size": [336, 336], "image_patch_size": 14,
            "image_pos_patch_size": 14, "image_emb_dim": 1024, "image_num_heads": 16, "image_num_key_value_heads": 16,
            "image_num_layers": 23, "image_head_dim": 64, "image_mlp_dim": 4096, "image_mlp_activations": "quick_gelu",
            "image_num_pos": 577, "image_norm_eps": 1e-5,
        },
    },
}  # fmt: skip
"""``config.json`` of each model; those of OLMoE and Qwen3 in the names of transformers 5."""
FLOAT32 = ("molmoe-1b",)
"""Published in float32; the others in bfloat16."""
_DEEPSEEK_PROCESSOR = {
    "processor_class": "DeepseekVLV2Processor", "candidate_resolutions": [[TILE * w, TILE * h] for w, h in TILES],
    "patch_size": 14, "downsample_ratio": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "normalize": True,
    "image_token": "<image>", "pad_token": "<｜▁pad▁｜>", "add_special_token": False, "sft_format": "deepseek",
    "mask_prompt": True, "ignore_id": -100,
}  # fmt: skip
PROCESSORS: dict[str, tuple[str, Config]] = {
    **dict.fromkeys(
        ("deepseek-vl2-tiny", "deepseek-vl2-small", "deepseek-vl2"), ("processor_config.json", _DEEPSEEK_PROCESSOR)
    ),
    "molmoe-1b": ("preprocessor_config.json", {"processor_class": "MolmoProcessor"}),
}
"""The file of each image processor, and its settings; MolmoE's are the defaults of its class."""


def cut(config: Config, layers: int) -> Config:
    """The configuration with so many decoder layers."""
    if "language_config" in config:
        return {**config, "language_config": {**config["language_config"], "num_hidden_layers": layers}}
    return {**config, "n_layers" if "n_layers" in config else "num_hidden_layers": layers}


def shapes(config: Config) -> Shapes:
    """All tensors of a model."""
    makers: dict[str, Callable[[Config], Shapes]] = {"deepseek_vl_v2": _deepseek_shapes, "molmo": _molmoe_shapes}
    return makers.get(config["model_type"], _text_shapes)(config)


def _below(prefix: str, found: Shapes) -> Shapes:
    return {f"{prefix}{name}": shape for name, shape in found.items()}


def _affine(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _gated(width: int, hidden: int) -> Shapes:
    return {"gate_proj.weight": (width, hidden), "up_proj.weight": (width, hidden), "down_proj.weight": (hidden, width)}


def _experts(count: int, width: int, hidden: int) -> Shapes:
    made: Shapes = {}
    for expert in range(count):
        made |= _below(f"experts.{expert}.", _gated(width, hidden))
    return made | {"gate.weight": (count, hidden)}


def _text_shapes(config: Config) -> Shapes:
    """OLMoE and Qwen3-MoE."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim", hidden // heads)
    query, key = heads * size, config["num_key_value_heads"] * size
    norms = (query, key) if config["model_type"] == "olmoe" else (size, size)  # OLMoE norms all heads together
    width = config.get("moe_intermediate_size", config["intermediate_size"])
    outside = (config["vocab_size"], hidden)
    found: Shapes = {"model.embed_tokens.weight": outside}
    for number in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": (hidden,),
            **_below("mlp.", _experts(config["num_experts"], width, hidden)),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (query, hidden),
            "self_attn.k_proj.weight": (key, hidden),
            "self_attn.v_proj.weight": (key, hidden),
            "self_attn.o_proj.weight": (hidden, query),
            "self_attn.q_norm.weight": norms[:1],
            "self_attn.k_norm.weight": norms[1:],
        }
        found |= _below(f"model.layers.{number}.", layer)
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": outside}


def _deepseek_shapes(config: Config) -> Shapes:
    text = config["language_config"]
    hidden, outside = text["hidden_size"], (text["vocab_size"], text["hidden_size"])
    found = {"image_newline": (hidden,), "view_seperator": (hidden,), **_siglip_shapes(config["vision_config"])}
    inputs = 4 * config["projector_config"]["input_dim"]
    found |= {**_affine("projector.layers.0", hidden, inputs), **_affine("projector.layers.2", hidden, hidden)}
    found["language.model.embed_tokens.weight"] = outside
    for number in range(text["num_hidden_layers"]):
        layer: Shapes = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        layer |= _below("self_attn.", _deepseek_attention(text))
        if number < text["first_k_dense_replace"]:
            mlp = _gated(text["intermediate_size"], hidden)
        else:
            width = text["moe_intermediate_size"]
            mlp = _experts(text["n_routed_experts"], width, hidden)
            mlp |= _below("shared_experts.", _gated(text["n_shared_experts"] * width, hidden))
            if text["topk_method"] == "noaux_tc":
                mlp["gate.e_score_correction_bias"] = (text["n_routed_experts"],)
        found |= _below(f"language.model.layers.{number}.", {**layer, **_below("mlp.", mlp)})
    return found | {"language.model.norm.weight": (hidden,), "language.lm_head.weight": outside}


def _deepseek_attention(text: Config) -> Shapes:
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    if not text["use_mla"]:
        return {f"{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
    rank, rope, plain, value = (text[k] for k in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
    return {
        "q_proj.weight": (heads * (plain + rope), hidden),
        "kv_a_proj_with_mqa.weight": (rank + rope, hidden),
        "kv_a_layernorm.weight": (rank,),
        "kv_b_proj.weight": (heads * (plain + value), rank),
        "o_proj.weight": (hidden, heads * value),
    }


def _siglip_shapes(vision: Config) -> Shapes:
    """The tower, in timm's names; its pooling head is stored and never called."""
    width, patch = vision["width"], vision["patch_size"]
    inner = int(width * vision["mlp_ratio"])
    mlp = {**_affine("mlp.fc1", inner, width), **_affine("mlp.fc2", width, inner)}
    found = {"pos_embed": (1, (vision["image_size"] // patch) ** 2, width)}
    found |= _affine("patch_embed.proj", width, 3, patch, patch)
    for number in range(vision["layers"]):
        block = {**_affine("norm1", width), **_affine("norm2", width), **mlp}
        block |= {**_affine("attn.qkv", 3 * width, width), **_affine("attn.proj", width, width)}
        found |= _below(f"blocks.{number}.", block)
    pool = {"latent": (1, 1, width), **_affine("q", width, width), **_affine("kv", 2 * width, width)}
    pool |= {**_affine("proj", width, width), **_affine("norm", width), **mlp}
    return _below("vision.", {**found, **_affine("norm", width), **_below("attn_pool.", pool)})


def _molmoe_shapes(config: Config) -> Shapes:
    hidden, width = config["d_model"], config["mlp_ratio"] * config["d_model"] // 2
    rows = config["embedding_size"]
    found: Shapes = {"wte.embedding": (rows, hidden), "wte.new_embedding": (config["additional_vocab_size"], hidden)}
    for number in range(config["n_layers"]):
        block = {f"attn.{name}.weight": (hidden,) for name in ("attn_norm", "q_norm", "k_norm")}
        block |= {"attn.att_proj.weight": (3 * hidden, hidden), "attn.attn_out.weight": (hidden, hidden)}
        block |= {"mlp.ff_norm.weight": (hidden,), **_below("mlp.", _experts(config["moe_num_experts"], width, hidden))}
        found |= _below(f"blocks.{number}.", block)
    found = _below("model.transformer.", {**found, "ln_f.weight": (hidden,)})
    found |= _below("model.vision_backbone.", _clip_shapes(config["vision_backbone"], hidden))
    return found | {"lm_head.weight": (rows, hidden)}


def _clip_shapes(vit: Config, hidden: int) -> Shapes:
    """The tower, the pooling of its patches, and the projector."""
    width, inner, patch = vit["image_emb_dim"], vit["image_mlp_dim"], vit["image_patch_size"]
    joined = 2 * width  # of the two layers whose outputs are taken
    found: Shapes = {"class_embedding": (width,), "positional_embedding": (vit["image_num_pos"], width)}
    found |= {"patch_embedding.weight": (width, 3 * patch * patch), **_affine("pre_ln", width)}
    for number in range(vit["image_num_layers"]):
        block: Shapes = {}
        for name in ("wq", "wk", "wv", "wo"):
            block |= _affine(f"attention.{name}", width, width)
        block |= {**_affine("feed_forward.w1", inner, width), **_affine("feed_forward.w2", width, inner)}
        block |= {**_affine("attention_norm", width), **_affine("ffn_norm", width)}
        found |= _below(f"transformer.resblocks.{number}.", block)
    pooling: Shapes = {}
    for name, inputs in (("wq", joined), ("wk", joined), ("wv", joined), ("wo", width)):
        pooling |= _affine(name, width, inputs)
    projector = {"w1.weight": (width, width), "w2.weight": (hidden, width), "w3.weight": (width, width)}
    return {
        "pad_embed": (2, joined),
        **_below("image_pooling_2d.", pooling),
        **_below("image_projector.", projector),
        **_below("image_vit.", found),
    }
