"""DeepSeek-VL2 under vLLM with tower and tiles of mopeq's own where the checkpoint is packed, vLLM's elsewhere.

vLLM's class builds its tower with timm at the size of the published models whatever the configuration says, and its
processor needs torchvision. Decoder, projector and the order of image tokens stay vLLM's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from copy import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import BatchFeature, PreTrainedConfig
from vllm.config import VllmConfig
from vllm.model_executor.models import deepseek_v2
from vllm.model_executor.models import deepseek_vl2 as theirs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.transformers_utils.chat_templates import registry as chat_templates

from mopeq.integrations.vllm.config import MopeqVllmConfig
from mopeq.models.configuration import DeepseekVL2Config
from mopeq.models.deepseek_vl2 import DeepseekVL2VisionModel
from mopeq.models.processing_deepseek_vl2 import DeepseekVLV2Processor, best_resolution
from mopeq.models.published import DEEPSEEK_VL2

__all__ = ["DeepseekVL2"]

NAMES = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."), (r"^blocks\.", "encoder.layers."),
    (r"^norm\.", "post_layernorm."), (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.attn\.proj\.", ".self_attn.out_proj."), (r"^pos_embed$", "embeddings.position_embedding.weight"),
)  # fmt: skip
"""Timm's names of a tower, in the files, to transformers'."""


TEMPLATES = chat_templates.CHAT_TEMPLATES_DIR / "template_deepseek_vl2.jinja", Path(__file__).with_suffix(".jinja")
"""Conversations as text: vLLM's, which puts a space where the answer begins, and the published one."""


def _packed(settings: Any) -> bool:
    return isinstance(settings, dict) and settings.get("quant_method") == "mopeq"


def _template(folder: str) -> Path:
    config = PreTrainedConfig.get_config_dict(folder)[0]
    return TEMPLATES[_packed(config.get("quantization_config"))]


chat_templates.register_chat_template_fallback_path(DEEPSEEK_VL2, _template)


class _Processor:
    """Mopeq's processor as vLLM's classes ask for it."""

    def __init__(self, own: Any) -> None:
        self.own, self.tokenizer = own, own.tokenizer
        self.image_size, self.patch_size, self.downsample_ratio = own.tile, own.patch_size, own.downsample_ratio
        self.image_token, self.image_token_id = own.image_token, own.image_token_id

    def select_best_resolution(self, size: tuple[int, int]) -> tuple[int, int]:
        return best_resolution(size, self.own.candidate_resolutions)

    def __call__(self, *, text: str, images: Any = (), **options: Any) -> BatchFeature:
        """``pixel_values`` (tiles, 3, side, side) and ``images_spatial_crop`` (images, 2) of one prompt."""
        made = self.own(text=text, images=list(images))
        found = {"input_ids": made["input_ids"]}
        if "images" in made:
            found |= {"pixel_values": made["images"][0], "images_spatial_crop": made["images_spatial_crop"][0]}
        return BatchFeature(found)


class _Attention(deepseek_v2.DeepseekAttention):  # type: ignore[misc]
    """Plain attention, whose linears vLLM builds without their names."""

    def __init__(self, *args: Any, quant_config: Any = None, prefix: str = "", **options: Any) -> None:
        if isinstance(quant_config, MopeqVllmConfig):
            quant_config = copy(quant_config)
            quant_config.within = prefix
        super().__init__(*args, quant_config=quant_config, prefix=prefix, **options)


deepseek_v2.DeepseekAttention = _Attention


class _Info(theirs.DeepseekVL2ProcessingInfo):  # type: ignore[misc]
    def get_hf_processor(self, **options: object) -> Any:
        if not _packed(getattr(self.get_hf_config(), "quantization_config", None)):
            return super().get_hf_processor(**options)
        if not hasattr(self, "made"):
            self.made = _Processor(DeepseekVLV2Processor.from_pretrained(self.model_id))
        return self.made


class _Tower(nn.Module):
    """Mopeq's tower under the name by which vLLM's class calls timm's."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward_features(self, pixels: Tensor) -> Tensor:
        """(tiles, 3, side, side) to (tiles, patches, width)."""
        features: Tensor = self.tower(pixels).last_hidden_state
        return features

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """From the names and shapes of the files."""
        held = dict(self.named_parameters())
        for name, weight in _renamed(weights):
            held[f"tower.{name}"].data.copy_(weight)
            held.pop(f"tower.{name}")
        if held:
            raise ValueError(f"the checkpoint lacks {len(held)} tensors of the tower, the first is {next(iter(held))}")
        return {name for name, _ in self.named_parameters()}


def _renamed(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, weight in weights:
        if name.startswith("attn_pool."):  # the published tower's pooling head, which nothing calls
            continue
        if ".attn.qkv." in name:
            for part, rows in zip("qkv", weight.chunk(3), strict=True):
                yield from _renamed([(name.replace("attn.qkv", f"self_attn.{part}_proj"), rows)])
            continue
        for pattern, new in NAMES:
            name = re.sub(pattern, new, name)
        yield name, weight[0] if name.endswith("position_embedding.weight") else weight


@MULTIMODAL_REGISTRY.register_processor(
    theirs.DeepseekVL2MultiModalProcessor, info=_Info, dummy_inputs=theirs.DeepseekVL2DummyInputsBuilder
)
class DeepseekVL2(theirs.DeepseekVLV2ForCausalLM):  # type: ignore[misc]
    """vLLM's model; packed, with mopeq's tower."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        self.folder = vllm_config.model_config.model
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def _init_vision_module(self, vision_config: Any, quant_config: Any, prefix: str = "") -> nn.Module:
        if not _packed(getattr(self.config, "quantization_config", None)):
            return super()._init_vision_module(vision_config, quant_config, prefix)  # type: ignore[no-any-return]
        config = DeepseekVL2Config.from_pretrained(self.folder)
        return _Tower(DeepseekVL2VisionModel._from_config(config.vision_config))  # type: ignore[no-untyped-call]
