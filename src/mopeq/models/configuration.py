"""Configurations of DeepSeek-VL2 and MolmoE, made from the published ``config.json`` or from ``save_pretrained``'s."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from mopeq.models.published import DEEPSEEK_VL2, MOLMO, deepseek_vl2, molmo

__all__ = ["DeepseekVL2Config", "MolmoEConfig"]


class DeepseekVL2Config(PreTrainedConfig):
    """DeepSeek-VL2 tiny, small and base; the decoder's class follows the published switches (published.py).

    Raises :class:`~mopeq.errors.ModelError` for a published configuration that no decoder here computes.
    """

    model_type = DEEPSEEK_VL2
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    text_config: Any = None
    vision_config: Any = None
    downsample_ratio: int = 2
    tile_tag: str = "2D"
    global_view_pos: str = "head"
    candidate_resolutions: list[list[int]] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        parts: dict[str, Any] = {k: kwargs.pop(k) for k in ("language_config", "projector_config") if k in kwargs}
        if parts:
            read = deepseek_vl2(
                {
                    **parts,
                    "vision_config": self.vision_config,
                    "tile_tag": self.tile_tag,
                    "global_view_pos": self.global_view_pos,
                }
            )
            for name in ("text_config", "vision_config", "downsample_ratio"):
                setattr(self, name, read[name])
        self.text_config = _part(self.text_config, "deepseek_v2")
        self.vision_config = _part(self.vision_config, "siglip_vision_model", vision_use_head=False)
        super().__post_init__(**kwargs)


class MolmoEConfig(PreTrainedConfig):
    """MolmoE-1B; the published configuration is one flat table with ``d_model``, ``n_layers`` and so on.

    head_rows: rows of the head; the input embedding has more. vit_layers: blocks of the tower whose outputs are joined.
    Raises :class:`~mopeq.errors.ModelError` for a dense Molmo and for switches that MolmoE does not have.
    """

    model_type = MOLMO
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    text_config: Any = None
    vision_config: Any = None
    head_rows: int = 50304
    vit_layers: list[int] = field(default_factory=lambda: [-2, -9])
    image_pooling_size: list[int] = field(default_factory=lambda: [2, 2])
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if "block_type" in kwargs or "d_model" in kwargs:
            read = molmo({**kwargs, "vit_layers": self.vit_layers})
            for name in ("text_config", "vision_config", "head_rows", "image_pooling_size"):
                setattr(self, name, read[name])
            kwargs = {k: v for k, v in kwargs.items() if k in KEPT}
        self.text_config = _part(self.text_config, "olmoe")
        self.vision_config = _part(self.vision_config, "clip_vision_model")
        super().__post_init__(**kwargs)


KEPT = ("dtype", "torch_dtype", "architectures", "quantization_config", "name_or_path", "_commit_hash",
        "attn_implementation", "experts_implementation")  # fmt: skip
"""Entries of a published MolmoE configuration that transformers itself reads."""


def _part(given: Any, usual: str, **defaults: Any) -> Any:
    """A part's configuration of the class that its ``model_type`` names, ``usual`` where it names none."""
    if isinstance(given, PreTrainedConfig):
        return given
    settings = {**defaults, **(given or {})}
    return AutoConfig.for_model(settings.pop("model_type", usual), **settings)
