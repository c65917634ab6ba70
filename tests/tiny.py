"""Tiny random models of every supported family, saved as the hub stores them.

Hidden size 64, experts of width 128: no square matrices, and groups of 32 and 64 fit everywhere. Weights are seeded and
large enough that every expert matters.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
PAD, BOS, EOS = 256, 257, 258
VOCABULARY = 264
VLM = (
    "aria",
    "deepseek_ocr2",
    "deepseek_vl_v2",
    "ernie4_5_vl_moe",
    "glm46v",
    "glm4v_moe",
    "internvl",
    "kimi_k25",
    "llama4",
    "molmo",
    "qwen3_5_moe",
    "qwen3_vl_moe",
)

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
_MLA = {
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "intermediate_size": 192,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
}
_QWEN = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "intermediate_size": 192}
_LLAMA4 = {
    "num_hidden_layers": 3,
    "moe_layers": [0, 2],
    "intermediate_size": 128,
    "intermediate_size_mlp": 192,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "head_dim": 16,
    "attention_chunk_size": 64,
}
_GLM4V_MOE: dict[str, Any] = {
    "text_config": {
        **_TEXT,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "intermediate_size": 192,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 0.5,
        },
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "image_size": 16,
        "patch_size": 4,
    },
    "image_token_id": 259,
    "image_start_token_id": 260,
    "image_end_token_id": 261,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "mixtral": {"intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **_QWEN,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "shared_expert_intermediate_size": 96,
        "num_key_value_heads": 4,
    },
    "qwen3_moe": {**_QWEN, "head_dim": 16},
    "deepseek_v2": {**_MLA, "q_lora_rank": None, "topk_method": "greedy", "n_shared_experts": 2},
    "deepseek_v3": {**_MLA, "q_lora_rank": 32, "n_group": 2, "topk_group": 1},
    "granitemoe": {"intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {
        "intermediate_size": 128,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "attention_bias": True,
        "lm_head_bias": True,
    },
    "gpt_oss": {
        "intermediate_size": 128,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "glm4_moe": {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "intermediate_size": 192,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    "qwen3_vl_moe": {
        "text_config": {
            **_TEXT,
            **_QWEN,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0],
            "patch_size": 4,
            "num_position_embeddings": 16,
        },
        "image_token_id": 259,
        "vision_start_token_id": 260,
        "vision_end_token_id": 261,
    },
    "qwen3_5_moe": {
        "text_config": {
            **_TEXT,
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 16,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 96,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 0.5,
            },
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "patch_size": 4,
            "num_position_embeddings": 16,
        },
        "image_token_id": 259,
        "vision_start_token_id": 260,
        "vision_end_token_id": 261,
    },
    "llama4": {
        "text_config": {**_TEXT, **_LLAMA4},
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "image_size": 16,
            "patch_size": 4,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
        "image_token_index": 259,
    },
    "llama4_text": _LLAMA4,
    "deepseek_vl_v2": {
        "text_config": {**_TEXT, **_MLA, "model_type": "deepseek_v2", "q_lora_rank": None, "topk_method": "greedy"},
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "image_size": 20,
            "patch_size": 4,
            "vision_use_head": False,
        },
    },
    "deepseek_ocr2": {
        "text_config": {
            **_TEXT,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "intermediate_size": 192,
            "moe_intermediate_size": 128,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
        },
        "vision_config": {
            "sam_config": {
                "hidden_size": 32,
                "output_channels": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
                "window_size": 2,
                "global_attn_indexes": [1],
                "downsample_channels": [24, 32],
            },
            "encoder_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
            },
        },
        "image_token_id": 259,
        "tie_word_embeddings": False,
    },
    "aria": {
        "text_config": {
            **_TEXT,
            "model_type": "aria_text",
            "intermediate_size": 128,
            "moe_num_experts": 8,
            "moe_topk": 2,
            "moe_num_shared_experts": 2,
        },
        "vision_config": {
            "model_type": "idefics3_vision",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "image_size": 16,
            "patch_size": 4,
        },
        "vision_feature_layer": -1,
        "projector_patch_to_query_dict": {"16": 4},
        "image_token_index": 259,
        "tie_word_embeddings": False,
    },
    "glm4v_moe": _GLM4V_MOE,
    "glm46v": {
        **_GLM4V_MOE,
        "text_config": {**_GLM4V_MOE["text_config"], "model_type": "glm4v_moe_text"},
        "vision_config": {**_GLM4V_MOE["vision_config"], "model_type": "glm4v_moe_vision"},
    },
    "internvl": {
        "text_config": {**_TEXT, **_QWEN, "model_type": "qwen3_moe", "head_dim": 16},
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "image_size": [16, 16],
            "patch_size": [4, 4],
        },
        "image_token_id": 259,
        "tie_word_embeddings": False,
    },
    "kimi_k25": {
        "text_config": {**_TEXT, **_MLA, "model_type": "deepseek_v3", "q_lora_rank": 32},
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "patch_size": 4,
        },
        "projection_hidden_size": 32,
        "image_token_id": 259,
        "tie_word_embeddings": False,
    },
    "molmo": {
        "text_config": {
            **_TEXT,
            "model_type": "olmoe",
            "vocab_size": VOCABULARY + 4,
            "intermediate_size": 128,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "num_key_value_heads": 4,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "num_hidden_layers": 9,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "image_size": 16,
            "patch_size": 4,
        },
        "head_rows": VOCABULARY,
    },
    "ernie4_5_moe": {
        "num_hidden_layers": 3,
        "intermediate_size": 192,
        "moe_intermediate_size": 128,
        "moe_num_experts": 8,
        "moe_num_shared_experts": 1,
        "moe_k": 2,
        "moe_layer_start_index": 1,
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            **_TEXT,
            "num_hidden_layers": 3,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "intermediate_size": 192,
            "moe_intermediate_size": [128, 192],
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 4]},
        },
        "vision_config": {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "patch_size": 4},
        "image_token_id": 259,
        "image_start_token_id": 260,
        "image_end_token_id": 261,
        "tie_word_embeddings": False,
    },
}
"""What each family's configuration adds to the common part."""


def tiny_config(family: str, **changes: Any) -> Any:
    """The configuration of a tiny model; ``changes`` go to the text part."""
    settings = dict(FAMILIES[family])
    if "text_config" in settings:
        settings["text_config"] = {**settings["text_config"], **changes}
        if "tie_word_embeddings" in changes:
            settings["tie_word_embeddings"] = changes["tie_word_embeddings"]
    else:
        settings = {**_TEXT, **settings, **changes}
    return AutoConfig.for_model(family, **settings)


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny model in memory with seeded weights, in evaluation mode."""
    auto = AutoModelForImageTextToText if family in VLM else AutoModelForCausalLM
    torch.manual_seed(seed)
    model = auto.from_config(tiny_config(family, **changes), dtype=torch.float32)
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=source)
            if "norm" in name and p.ndim == 1 and not name.endswith("bias"):
                p.copy_(1 + 0.1 * noise)
            elif p.ndim == 1 or name.endswith("bias"):
                p.copy_(0.1 * noise)
            elif "embed" in name:
                p.copy_(noise)
            elif name.endswith(("gate.weight", "router.weight")):
                p.copy_(0.25 * noise)
            else:
                p.copy_(noise * p.shape[-1] ** -0.5)
            p.data = p.data.to(dtype)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=source))
    return model.eval()


def save_tiny(
    family: str, folder: str | Path, dtype: torch.dtype = torch.float32, *, hub_layout: bool = True, seed: int = 0,
    max_shard_size: str = "50GB", **changes: Any,
) -> Path:  # fmt: skip
    """Save a tiny model and a byte-level tokenizer; ``hub_layout=False`` writes transformers' own fused names."""
    folder = Path(folder)
    model = tiny_model(family, seed=seed, dtype=dtype, **changes)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, EOS
    model.save_pretrained(folder, save_original_format=hub_layout, max_shard_size=max_shard_size)
    if family == "qwen3_vl_moe" and hub_layout:  # the hub's files are (E, in, out); transformers 5 saves (E, out, in)
        rewrite(folder, {k: t.mT.contiguous() for k, t in tensors(folder).items() if t.ndim == 3 and ".experts." in k})
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: str | Path) -> None:
    """One token a byte, plus ``<pad>``, ``<bos>``, ``<eos>``."""
    vocabulary = {symbol: i for i, symbol in enumerate(BYTES)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=512
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder)


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a saved model."""
    return {k: t for file in sorted(Path(folder).glob("*.safetensors")) for k, t in load_file(file).items()}


def rewrite(folder: str | Path, changed: Mapping[str, torch.Tensor | None]) -> None:
    """Replace, add or (None) delete tensors of a saved model; the result is one file without an index."""
    kept = {k: t.clone() for k, t in tensors(folder).items()}
    kept.update({k: t for k, t in changed.items() if t is not None})
    for file in [*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.safetensors.index.json")]:
        file.unlink()
    save_file(
        {k: t for k, t in kept.items() if changed.get(k, t) is not None},
        Path(folder) / "model.safetensors",
        metadata={"format": "pt"},
    )


def edit_config(folder: str | Path, **changes: Any) -> None:
    """Set or (None) delete entries of a saved model's config.json."""
    path = Path(folder) / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
