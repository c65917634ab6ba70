"""Names and layouts of the published checkpoints' tensors, to those of the modules here, for transformers' loader.

transformers applies renamings in order, then at most one converter, and the reverse of all that when it saves, so that
a saved model has the published names again. A list that is registered for a class sees only names below its modules.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)

__all__ = ["CONVERSIONS", "Rearranged"]

Conversions = list[WeightRenaming | WeightConverter]


def _only(found: Any) -> Tensor:
    """A converter gets a tensor, or a list of one."""
    tensor: Tensor = found[0] if isinstance(found, list) else found
    return tensor


class Rearranged(ConversionOps):
    """One tensor laid out anew, by a function and its inverse."""

    def __init__(self, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> None:
        self.there, self.back = there, back

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """The tensor under its new name."""
        (tensor,) = map(_only, input_dict.values())
        return {target_patterns[0]: self.there(tensor).contiguous()}

    @property
    def reverse_op(self) -> ConversionOps:
        """From the modules' layout to the published one."""
        return Rearranged(self.back, self.there)


def _module(name: str) -> str:
    """``q_proj`` of ``self_attn.q_proj.weight``."""
    return name.split(".")[-2]


class Divided(ConversionOps):
    """A matrix to several, which lie below each other in it."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """The parts."""
        (whole,) = map(_only, input_dict.values())
        parts = whole.chunk(len(target_patterns))
        return {name: part.contiguous() for name, part in zip(target_patterns, parts, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        """Several to one."""
        return United()


class United(ConversionOps):
    """The inverse of :class:`Divided`; of a quantized model the parts stay apart, as they were stored."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """The whole, or the parts; under full names, which transformers 5.17 has renamed already and 5.23 has not."""
        whole: str = kwargs["full_layer_name"]
        if getattr(kwargs["model"], "hf_quantizer", None) is None:
            return {whole: torch.cat([_only(input_dict[name]) for name in source_patterns])}
        last = _module(target_patterns[0])
        return {whole.replace(last, _module(name)): _only(part) for name, part in input_dict.items()}

    @property
    def reverse_op(self) -> ConversionOps:
        """One to several."""
        return Divided()


class Joined(ConversionOps):
    """The base rows of MolmoE's embedding, as many as the head has, and the new ones below them."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Both tables in one."""
        return {target_patterns[0]: torch.cat([_only(input_dict[name]) for name in source_patterns])}

    @property
    def reverse_op(self) -> ConversionOps:
        """One table in two."""
        return Parted()


class Parted(ConversionOps):
    """The inverse of :class:`Joined`."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Both tables."""
        (table,) = map(_only, input_dict.values())
        rows = kwargs["config"].head_rows
        return {
            name: part.contiguous() for name, part in zip(target_patterns, (table[:rows], table[rows:]), strict=True)
        }

    @property
    def reverse_op(self) -> ConversionOps:
        """Two tables in one."""
        return Joined()


def _without_batch(positions: Tensor) -> Tensor:
    return positions[0]


def _with_batch(positions: Tensor) -> Tensor:
    return positions[None]


def _to_kernel(matrix: Tensor) -> Tensor:
    """(width, y x channel) to (width, channel, y, x)."""
    side = isqrt(matrix.shape[1] // 3)
    return matrix.reshape(-1, side, side, 3).permute(0, 3, 1, 2)


def _to_matrix(kernel: Tensor) -> Tensor:
    return kernel.permute(0, 2, 3, 1).flatten(1)


def _experts() -> Conversions:
    """Experts one by one, to the two fused tensors of transformers' experts modules."""
    stem = "mlp.experts"
    return [
        WeightConverter(
            [f"{stem}.*.gate_proj.weight", f"{stem}.*.up_proj.weight"],
            f"{stem}.gate_up_proj",
            [MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(f"{stem}.*.down_proj.weight", f"{stem}.down_proj", [MergeModulelist(dim=0)]),
    ]


def _timm_tower() -> Conversions:
    """DeepSeek-VL2's SigLIP, stored under timm's names with q, k and v in one matrix."""
    return [
        WeightRenaming(r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
        WeightRenaming(r"^blocks\.", "encoder.layers."),
        WeightRenaming(r"^norm\.", "post_layernorm."),
        WeightRenaming(r"\.norm1\.", ".layer_norm1."),
        WeightRenaming(r"\.norm2\.", ".layer_norm2."),
        WeightRenaming(r"\.attn\.proj\.", ".self_attn.out_proj."),
        WeightConverter("pos_embed", "embeddings.position_embedding.weight", [Rearranged(_without_batch, _with_batch)]),
        WeightConverter("attn.qkv", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], [Chunk(dim=0)]),
    ]


def _clip_tower() -> Conversions:
    """MolmoE's CLIP; the patch embedding is a matrix over pixels with colours innermost."""
    kernel = Rearranged(_to_kernel, _to_matrix)
    return [
        WeightRenaming(r"^class_embedding", "embeddings.class_embedding"),
        WeightRenaming(r"^positional_embedding", "embeddings.position_embedding.weight"),
        WeightRenaming(r"^pre_ln\.", "pre_layrnorm."),
        WeightRenaming(r"^transformer\.resblocks\.", "encoder.layers."),
        WeightRenaming(r"\.attention\.wq\.", ".self_attn.q_proj."),
        WeightRenaming(r"\.attention\.wk\.", ".self_attn.k_proj."),
        WeightRenaming(r"\.attention\.wv\.", ".self_attn.v_proj."),
        WeightRenaming(r"\.attention\.wo\.", ".self_attn.out_proj."),
        WeightRenaming(r"\.feed_forward\.w1\.", ".mlp.fc1."),
        WeightRenaming(r"\.feed_forward\.w2\.", ".mlp.fc2."),
        WeightRenaming(r"\.attention_norm\.", ".layer_norm1."),
        WeightRenaming(r"\.ffn_norm\.", ".layer_norm2."),
        WeightConverter("patch_embedding.weight", "embeddings.patch_embedding.weight", [kernel]),
    ]


def _molmoe_decoder() -> Conversions:
    """MolmoE's decoder: q, k and v in one matrix, and new rows of the embedding in a table of their own."""
    return [
        WeightRenaming(r"^blocks\.", "layers."),
        WeightRenaming(r"^ln_f\.", "norm."),
        WeightRenaming(r"\.attn\.", ".self_attn."),
        WeightRenaming(r"\.self_attn\.attn_norm\.", ".input_layernorm."),
        WeightRenaming(r"\.self_attn\.attn_out\.", ".self_attn.o_proj."),
        WeightRenaming(r"\.mlp\.ff_norm\.", ".post_attention_layernorm."),
        WeightConverter(
            "self_attn.att_proj.weight",
            [f"self_attn.{name}_proj.weight" for name in "qkv"],
            [Divided()],
        ),
        WeightConverter(["wte.embedding", "wte.new_embedding"], "embed_tokens.weight", [Joined()]),
        *_experts(),
    ]


CONVERSIONS: dict[str, Callable[[], Conversions]] = {
    "DeepseekVL2TextModel": _experts,
    "DeepseekVL2VisionModel": _timm_tower,
    "MolmoETextModel": _molmoe_decoder,
    "MolmoEVisionModel": _clip_tower,
}
"""By class, as ``register_checkpoint_conversion_mapping`` takes them."""
