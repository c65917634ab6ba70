"""MolmoE under vLLM: its OLMoE decoder, mopeq's tower, crops and conversation.

vLLM has no class for it (its ``molmo`` is the dense family). Features of an image are added to the embeddings of its
tokens, where other models put them in their place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BatchFeature
from transformers.core_model_loading import WeightRenaming
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdateDetails,
)
from vllm.transformers_utils.chat_templates import registry as chat_templates

from mopeq.models.configuration import MolmoEConfig
from mopeq.models.conversion import CONVERSIONS, Rearranged
from mopeq.models.molmoe import MolmoEVisionBackbone
from mopeq.models.processing_molmoe import MolmoProcessor
from mopeq.models.published import MOLMO

__all__ = ["MolmoE"]

TOWER = "vision_backbone.image_vit."

chat_templates.register_chat_template_fallback_path(MOLMO, Path(__file__).with_suffix(".jinja"))


class _Processor:
    """Mopeq's processor as vLLM calls one: images apart from text."""

    def __init__(self, own: MolmoProcessor) -> None:
        self.own, self.tokenizer = own, own.tokenizer

    def __call__(self, *, images: Any = (), **options: Any) -> BatchFeature:
        """``images``, ``image_masks``, ``image_input_idx`` of all crops, and ``crops`` of each image.

        The indices are those of an image that begins a prompt; their order is used.
        """
        made = [self.own.image_row(image).images[0] for image in images]
        if not made:
            return BatchFeature()
        names = ("images", "image_masks", "image_input_idx")
        parts = {
            name: torch.from_numpy(np.concatenate(p)) for name, p in zip(names, zip(*made, strict=True), strict=True)
        }
        return BatchFeature(parts | {"crops": torch.tensor([len(crops) for crops, _, _ in made])})


class _Info(BaseProcessingInfo):  # type: ignore[misc]
    def get_hf_processor(self, **options: object) -> Any:
        if not hasattr(self, "made"):
            self.made = _Processor(MolmoProcessor.from_pretrained(self.model_id))
        return self.made

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": 1}

    def largest(self) -> tuple[int, int]:
        """(width, height) of an image with the most tokens."""
        own = self.get_hf_processor().own
        sizes = [(own.side * c, own.side * r) for r in range(1, own.max_crops + 1) for c in range(1, own.max_crops + 1)]
        fitting = [(w, h) for w, h in sizes if w * h <= own.max_crops * own.side**2]
        return max(fitting, key=lambda size: len(own.image_tokens((size[1], size[0]))))


class _Dummy(BaseDummyInputsBuilder[_Info]):  # type: ignore[misc]
    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        token: str = self.info.get_hf_processor().own.image_token
        return token * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> Any:
        width, height = self.info.largest()
        count = mm_counts.get("image", 0)
        return {
            "image": self._get_dummy_images(
                width=width, height=height, num_images=count, overrides=mm_options.get("image")
            )
        }


class _MultiModal(BaseMultiModalProcessor[_Info]):  # type: ignore[misc]
    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        made: BatchFeature = self.info.get_hf_processor()(images=hf_data.get("images", ()))
        return made

    def _get_mm_fields_config(self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        crops = hf_inputs.get("crops", torch.empty(0))
        parts = ("images", "image_masks", "image_input_idx")
        fields = {name: MultiModalFieldConfig.flat_from_sizes("image", crops) for name in parts}
        return fields | {"crops": MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        own = self.info.get_hf_processor().own

        def tokens(number: int) -> Any:
            size = mm_items["image"].get_image_size(number)
            ids = own.image_tokens((size.height, size.width))
            return PromptUpdateDetails.select_token_id(ids, embed_token_id=own.patch_id)

        target = [own.tokenizer.get_vocab()[own.image_token]]
        return [PromptReplacement(modality="image", target=target, replacement=tokens)]


@MULTIMODAL_REGISTRY.register_processor(_MultiModal, info=_Info, dummy_inputs=_Dummy)
class MolmoE(nn.Module, SupportsMultiModal):  # type: ignore[misc]
    """The published model, packed or not."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_substr={
            ".attn.attn_norm.": ".input_layernorm.", ".mlp.ff_norm.": ".post_attention_layernorm.",
            ".attn.attn_out": ".self_attn.o_proj", ".attn.": ".self_attn.",
        },
        orig_to_new_prefix={
            "model.transformer.blocks.": "language_model.model.layers.",
            "model.transformer.layers.": "language_model.model.layers.",
            "model.transformer.ln_f.": "language_model.model.norm.",
            "model.transformer.embed_tokens.": "language_model.model.embed_tokens.",
            "model.transformer.ff_out": "language_model.lm_head", "lm_head": "language_model.lm_head",
            "model.vision_backbone.": "vision_backbone.",
        },
    )  # fmt: skip

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """What stands for an image in a conversation."""
        return "<|image|>"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = MolmoEConfig.from_pretrained(vllm_config.model_config.model)
        with self._mark_tower_model(vllm_config, "image"):  # type: ignore[operator]
            self.vision_backbone = MolmoEVisionBackbone(config)
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            inner = maybe_prefix(prefix, "language_model")
            self.language_model: Any = init_vllm_registered_model(
                vllm_config=vllm_config, hf_config=config.text_config, architectures=["OlmoeForCausalLM"], prefix=inner
            )
        # the embedding has rows for image tokens, which the head lacks
        self.language_model.lm_head = ParallelLMHead(
            config.head_rows,
            config.text_config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{inner}.lm_head",
        )
        self.language_model.logits_processor = LogitsProcessor(config.head_rows)

    def embed_multimodal(self, **given: Any) -> Any:
        """Features (tokens, hidden) of each image, in the order of its tokens."""
        if given.get("images") is None:
            return []
        features = self.vision_backbone(given["images"].to(self.vision_backbone.pad_embed), given["image_masks"])
        sizes = given["crops"].flatten().tolist()
        places = given["image_input_idx"].split(sizes)
        return [f[p >= 0][p[p >= 0].argsort()] for f, p in zip(features.split(sizes), places, strict=True)]

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """Embeddings (tokens, hidden) with features added where ``is_multimodal``."""
        made: Tensor = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings is not None and len(multimodal_embeddings):
            made = made.clone()
            made[is_multimodal] += torch.cat(list(multimodal_embeddings)).to(made.dtype)
        return made

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None, **given: object,
    ) -> Any:  # fmt: skip
        """Hidden states (tokens, hidden)."""
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Any:
        """Logits (tokens, rows of the head)."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """From the published names; :class:`ValueError` where the tower is not complete."""
        loaded: set[str] = AutoWeightsLoader(self).load_weights(_renamed(weights), mapper=self.hf_to_vllm_mapper)
        missing = {f"vision_backbone.{name}" for name, _ in self.vision_backbone.named_parameters()} - loaded
        if missing:
            raise ValueError(f"the checkpoint lacks {len(missing)} tensors of the tower, the first is {min(missing)}")
        return loaded


def _renamed(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tower under the names of its modules, both tables of the embedding in one, joined q, k and v apart."""
    conversions = CONVERSIONS["MolmoEVisionModel"]()
    tables: dict[str, Tensor] = {}
    for name, weight in weights:
        stem, tower, inner = name.partition(TOWER)
        if tower:
            for rule in conversions:
                inner, found = rule.rename_source_key(inner)
                if found and not isinstance(rule, WeightRenaming):
                    weight = cast(Rearranged, rule.operations[0]).there(weight)
            yield f"{stem}{tower}{inner}", weight
        elif ".wte." in name:
            tables[name.rpartition(".")[2]] = weight
        elif ".att_proj." in name:
            for part, rows in zip("qkv", weight.chunk(3), strict=True):
                yield name.replace("att_proj", f"{part}_proj"), rows
        else:
            yield name, weight
    yield "model.transformer.embed_tokens.weight", torch.cat([tables["embedding"], tables["new_embedding"]])
