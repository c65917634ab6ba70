"""The supported architectures by ``model_type``: one declaration each.

The facts are those of the transformers 5 model classes and of the checkpoints on the Hugging Face Hub. Families that
the Hub stores expert by expert may also be stored fused, as transformers keeps them in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mopeq.adapters.config import Config, count, numbers
from mopeq.adapters.family import MLA, MLA_QUERIES, QKVO, Family
from mopeq.adapters.layouts import Layout, fused, per_expert
from mopeq.errors import ModelError
from mopeq.models.published import deepseek_vl2, molmo

__all__ = ["FAMILIES"]


def _every(text: Config, index: int) -> bool:
    return True


def _sparse_step(text: Config, index: int) -> bool:
    dense = numbers(text, "mlp_only_layers") or []
    return index not in dense and (index + 1) % count(text, "decoder_sparse_step", default=1) == 0


def _after_first(usual: int) -> Callable[[Config, int], bool]:
    def is_moe(text: Config, index: int) -> bool:
        return index >= count(text, "first_k_dense_replace", default=usual, least=0)

    return is_moe


def _interval(text: Config, index: int) -> bool:
    last = count(text, "moe_layer_end_index", default=-1, least=-1)
    return (
        index >= count(text, "moe_layer_start_index", default=1, least=0)
        and (last == -1 or index <= last)
        and (index + 1) % count(text, "moe_layer_interval", default=1) == 0
    )


def _listed(text: Config, index: int) -> bool:
    listed = numbers(text, "moe_layers")
    if listed is not None:
        return index in listed
    return (index + 1) % count(text, "interleave_moe_layer_step", default=1) == 0


def _experts_of(kind: str) -> tuple[Layout, ...]:
    """Layouts of the experts that ERNIE 4.5 VL has for one kind of tokens."""
    module = f"mlp.{kind}.experts"
    return per_expert("mlp.experts", *_NAMES), fused(f"{module}.gate_up_proj", f"{module}.down_proj")


def _typed(text: Config, index: int) -> bool:
    found = text.get("mlp_layer_types")
    if not isinstance(found, list) or len(found) <= index or not set(map(str, found)) <= {"dense", "sparse"}:
        raise ModelError(
            f"config.json has mlp_layer_types = {found!r}; expected dense or sparse for every layer; "
            "use the model's own config.json"
        )
    return bool(found[index] == "sparse")


_NAMES = ("gate_proj", "up_proj", "down_proj")
_W = ("w1", "w3", "w2")
_MLP_FUSED = fused("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_CORRECTION = r"mlp\.gate\.(weight|e_score_correction_bias)"

_OLMOE = Family(
    block="mlp",
    router="mlp.gate",
    layouts=(per_expert("mlp.experts", *_NAMES), _MLP_FUSED),
    router_keys=r"mlp\.gate\.weight",
    is_moe=_every,
)
_MIXTRAL = replace(
    _OLMOE,
    stored_block="block_sparse_moe",
    matrices=_W,
    layouts=(per_expert("block_sparse_moe.experts", *_W), _MLP_FUSED),
    router_keys=r"(block_sparse_moe|mlp)\.gate\.weight",
)
_QWEN3_MOE = replace(_OLMOE, width="moe_intermediate_size", is_moe=_sparse_step)
_GLM4_MOE = replace(
    _OLMOE,
    width="moe_intermediate_size",
    is_moe=_after_first(1),
    shared="shared_experts",
    router_keys=_CORRECTION,
    extra_layers=True,
)
_GLM4V_MOE = replace(
    _GLM4_MOE,
    text="text_config",
    prefix="model.language_model.",
    towers={"model.visual.": "vision", "model.visual.merger.": "projector"},
)
_DEEPSEEK_V3 = replace(_GLM4_MOE, attention=MLA, alternatives=MLA_QUERIES, is_moe=_after_first(3))
_LLAMA4_TEXT = Family(
    block="feed_forward",
    router="feed_forward.router",
    layouts=(fused("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj", stored="in_out"),),
    router_keys=r"feed_forward\.router\.weight",
    is_moe=_listed,
    shared="shared_expert",
)

_DELTA_NET = {
    "linear_attn.in_proj_qkv": 1,
    "linear_attn.in_proj_z": 1,
    "linear_attn.in_proj_a": 1,
    "linear_attn.in_proj_b": 1,
    "linear_attn.out_proj": 0,
}
"""Matrices of a gated delta net, the linear attention of Qwen3.5."""
_DELTA_REST = ("conv1d.weight", "norm.weight", "dt_bias", "A_log")
_QK_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")

_LLAVA_NAMES = (
    (r"\Alanguage_model\.model\.", "model.language_model."),
    (r"\Alanguage_model\.lm_head\.", "lm_head."),
    (r"\A(vision_tower|multi_modal_projector)\.", r"model.\1."),
)
"""Files of models like LLaVA have decoder, tower and projector side by side; transformers nests them."""
_LLAVA_TOWERS = {"model.vision_tower.": "vision", "model.multi_modal_projector.": "projector"}

FAMILIES: dict[str, Family] = {
    "aria": replace(
        _OLMOE,
        router="mlp.router",
        router_keys=r"mlp\.router\.weight",
        layouts=(
            fused("mlp.experts.fc1.weight", "mlp.experts.fc2.weight", stored="in_out"),
            fused("mlp.experts.gate_up_proj", "mlp.experts.down_proj", stored="in_out"),
        ),
        shared="shared_experts",
        text="text_config",
        prefix="model.language_model.",
        renamed=_LLAVA_NAMES,
        towers=_LLAVA_TOWERS,
    ),
    "olmoe": _OLMOE,
    "mixtral": _MIXTRAL,
    "phimoe": replace(_MIXTRAL, router="mlp.router", router_keys=r"block_sparse_moe\.gate\.weight|mlp\.router\.weight"),
    "granitemoe": replace(
        _OLMOE,
        block="block_sparse_moe",
        router="block_sparse_moe.router",
        layouts=(
            fused("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
            fused("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
        ),
        router_keys=r"block_sparse_moe\.router\.(layer\.)?weight",
    ),
    "qwen2_moe": replace(_QWEN3_MOE, shared="shared_expert", router_keys=r"mlp\.(gate|shared_expert_gate)\.weight"),
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_vl_moe": replace(
        _QWEN3_MOE,
        layouts=(fused("mlp.experts.gate_up_proj", "mlp.experts.down_proj", stored="either"),),
        text="text_config",
        prefix="model.language_model.",
        towers={
            "model.visual.": "vision",
            "model.visual.merger.": "projector",
            "model.visual.deepstack_merger_list.": "projector",
        },
    ),
    "qwen3_5_moe": replace(  # attention in some layers, gated delta nets in the others
        _QWEN3_MOE,
        is_moe=_every,
        shared="shared_expert",
        router_keys=r"mlp\.(gate|shared_expert_gate)\.weight",
        attention={**QKVO, **_DELTA_NET},
        alternatives=frozenset({*QKVO, *_DELTA_NET}),
        mixers={
            "full_attention": (*(f"{name}.weight" for name in QKVO), *_QK_NORMS),
            "linear_attention": (
                *(f"{name}.weight" for name in _DELTA_NET),
                *(f"linear_attn.{name}" for name in _DELTA_REST),
            ),
        },
        other=r"linear_attn\.(conv1d\.weight|norm\.weight|dt_bias|A_log)",
        text="text_config",
        prefix="model.language_model.",
        towers={"model.visual.": "vision", "model.visual.merger.": "projector"},
        dropped=r"mtp\..*",
    ),
    "deepseek_v2": replace(_DEEPSEEK_V3, is_moe=_after_first(0), router_keys=r"mlp\.gate\.weight", extra_layers=False),
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_ocr2": replace(
        _OLMOE,
        width="moe_intermediate_size",
        is_moe=_typed,
        shared="shared_experts",
        text="text_config",
        prefix="model.language_model.",
        renamed=((r"\Amodel\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),),
        towers={
            "model.sam_model.": "vision",
            "model.qwen2_model.": "vision",
            "model.vision_tower.": "vision",
            "model.projector.": "projector",
            "model.multi_modal_projector.": "projector",
            "model.view_sep": "projector",  # seperator in the hub's files, separator in transformers
        },
    ),
    "deepseek_vl_v2": replace(  # either attention
        _DEEPSEEK_V3,
        attention={**MLA, **QKVO},
        alternatives=frozenset({*MLA, *QKVO} - {"self_attn.o_proj"}),
        is_moe=_after_first(0),
        extra_layers=False,
        read=deepseek_vl2,
        text="text_config",
        prefix="language.model.",
        head="language.lm_head",
        towers={
            "vision.": "vision",
            "projector.": "projector",
            "image_newline": "projector",
            "view_seperator": "projector",
        },
        dropped=r"vision\.attn_pool\..*",
    ),
    "glm4_moe": _GLM4_MOE,
    "glm46v": replace(_GLM4V_MOE, decoders=("glm4v_moe_text",), layouts=(_MLP_FUSED,)),
    "glm4v_moe": _GLM4V_MOE,
    "internvl": replace(  # with Qwen3-MoE as its decoder
        _QWEN3_MOE,
        text="text_config",
        decoders=("qwen3_moe",),
        prefix="model.language_model.",
        renamed=_LLAVA_NAMES,
        towers=_LLAVA_TOWERS,
    ),
    "kimi_k25": replace(
        _DEEPSEEK_V3,
        text="text_config",
        prefix="model.language_model.",
        renamed=(
            # transformers' own way back from its names turns layers into blocks
            (r"\Alanguage_model\.model\.blocks\.", "language_model.model.layers."),
            *_LLAVA_NAMES,
            (r"\Amm_projector\.", "model.mm_projector."),
        ),
        towers={"model.vision_tower.": "vision", "model.mm_projector.": "projector"},
    ),
    "molmo": replace(
        _OLMOE,
        read=molmo,
        text="text_config",
        prefix="model.transformer.",
        towers={
            "model.vision_backbone.": "projector",
            "model.vision_backbone.image_vit.": "vision",
            "model.transformer.wte.new_embedding": "embedding",
        },
        renamed=(
            (r"\Amodel\.transformer\.wte\.embedding\Z", "model.transformer.embed_tokens.weight"),
            (r"\Amodel\.transformer\.ln_f\.", "model.transformer.norm."),
            (r"\Amodel\.transformer\.blocks\.", "model.transformer.layers."),
            (r"\.attn\.attn_norm\.", ".input_layernorm."),
            (r"\.attn\.attn_out\.", ".self_attn.o_proj."),
            (r"\.attn\.", ".self_attn."),
            (r"\.mlp\.ff_norm\.", ".post_attention_layernorm."),
        ),
        joined={"self_attn.att_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")},
    ),
    "gpt_oss": replace(
        _OLMOE,
        router="mlp.router",
        layouts=(fused("mlp.experts.gate_up_proj", "mlp.experts.down_proj", stored="in_out", interleaved=True),),
        router_keys=r"mlp\.router\.(weight|bias)",
        biases=r"mlp\.experts\.(gate_up|down)_proj_bias",
        other=r"self_attn\.sinks",
    ),
    "llama4_text": _LLAMA4_TEXT,
    "llama4": replace(
        _LLAMA4_TEXT,
        text="text_config",
        prefix="language_model.model.",
        head="language_model.lm_head",
        towers={"vision_model.": "vision", "multi_modal_projector.": "projector"},
    ),
    "ernie4_5_moe": replace(
        _GLM4_MOE,
        is_moe=_interval,
        router_keys=r"mlp\.(gate\.weight|(gate\.)?moe_statics\.e_score_correction_bias)",
        extra_layers=False,
        dropped=r"(model\.)?mtp_.*",
        tied=True,
    ),
    "ernie4_5_vl_moe": replace(
        _GLM4_MOE,
        router="gate",
        kinds={kind: _experts_of(kind) for kind in ("text_moe", "vision_moe")},
        is_moe=_typed,
        router_keys=r"mlp\.(gate\.weight(_1)?|((text|vision)_moe\.gate\.)?(weight|moe_statics\.e_score_correction_bias))",
        extra_layers=False,
        text="text_config",
        prefix="model.language_model.",
        renamed=((r"\Amodel\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),),
        towers={
            "model.vision_model.": "vision",
            "model.vision_tower.": "vision",
            "model.resampler_model.": "projector",
        },
        tied=True,
    ),
}
