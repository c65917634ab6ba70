"""Names and layouts of the published checkpoints' tensors, to those of the modules here, for transformers' loader.

transformers applies renamings in order, then at most one converter, and the reverse of all that when it saves, so that
a saved model has the published names again. A list that is registered for a class sees only names below its modules.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import Any

from torch import Tensor
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)

__all__ = ["CONVERSIONS"]

Conversions = list[WeightRenaming | WeightConverter]


class Rearranged(ConversionOps):
    """One tensor laid out anew, by a function and its inverse."""

    def __init__(self, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> None:
        self.there, self.back = there, back

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """The tensor under its new name."""
        (found,) = input_dict.values()
        tensor = found[0] if isinstance(found, list) else found
        return {target_patterns[0]: self.there(tensor).contiguous()}

    @property
    def reverse_op(self) -> ConversionOps:
        """From the modules' layout to the published one."""
        return Rearranged(self.back, self.there)


def _without_batch(positions: Tensor) -> Tensor:
    return positions[0]


def _with_batch(positions: Tensor) -> Tensor:
    return positions[None]


def _to_kernel(matrix: Tensor) -> Tensor:
    """(width, y x channel) to (width, channel, y, x)."""
    side = isqrt(matrix.shape[1] // 3)
    return matrix.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2)


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


CONVERSIONS: dict[str, Callable[[], Conversions]] = {
    "deepseek_vl_v2": _experts,
    "DeepseekVL2VisionModel": _timm_tower,
}
"""By model type or class, as ``register_checkpoint_conversion_mapping`` takes them."""
