"""MolmoE: a CLIP tower tapped at two blocks, 2x2 attention pooling, and an OLMoE decoder.

Modules keep the published names where transformers' blocks do not bring their own (``model.transformer``,
``model.vision_backbone``); conversion.py maps the others. Source: arXiv 2409.17146 and modeling_molmoe.py of
allenai/MolmoE-1B-0924.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, GenerationMixin, OlmoeModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils.generic import can_return_tuple

from mopeq.errors import InputError
from mopeq.models.configuration import MolmoEConfig
from mopeq.models.shared import ImagesInPrompt, VisionLanguageOutput, with_head

__all__ = ["MolmoEForConditionalGeneration"]

PADDING = -1
"""What the published processor fills token sequences, crops and masks up with."""


class MolmoETextModel(OlmoeModel):
    """OLMoE's decoder under a name of its own, for which conversion.py has the published names."""


class MolmoEVisionModel(CLIPVisionModel):
    """CLIP's tower without the last norm, which the checkpoint lacks and nothing uses."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.post_layernorm = nn.Identity()  # type: ignore[assignment]

    def features(self, patches: Tensor, layers: list[int]) -> Tensor:
        """Outputs of some blocks, without the class token, joined.

        Args:
            patches: (crops, n * n, side * side * 3), pixels of each patch row by row, colours innermost.
            layers: negative numbers of blocks, -1 for the last.

        Returns:
            (crops, n * n, width * layers).
        """
        config: Any = self.config
        n, side = config.image_size // config.patch_size, config.patch_size
        grid = patches.reshape(-1, n, n, side, side, 3)
        pixels = grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, n * side, n * side)
        hidden = self.pre_layrnorm(self.embeddings(pixels.to(self.dtype)))
        states = []
        for block in self.encoder.layers[: max(layers) + 1 or None]:  # what comes after is not used
            hidden = block(hidden, attention_mask=None)
            states.append(hidden)
        depth = len(self.encoder.layers)
        return torch.cat([states[depth + layer] for layer in layers], dim=-1)[:, 1:]


class MolmoEPooling(nn.Module):
    """Attention within each window of patches; the query is the window's mean."""

    def __init__(self, config: MolmoEConfig) -> None:
        super().__init__()
        vision = config.vision_config
        joined, width = vision.hidden_size * len(config.vit_layers), vision.hidden_size
        self.heads, self.size = vision.num_attention_heads, config.image_pooling_size
        self.wq, self.wk, self.wv = (nn.Linear(joined, width) for _ in range(3))
        self.wo = nn.Linear(width, width)

    def forward(self, patches: Tensor) -> Tensor:
        """(crops, n * n, joined width) to (crops, windows, width), windows row by row."""
        side = int(patches.shape[1] ** 0.5)
        h, w = self.size
        grid = patches.reshape(-1, side // h, h, side // w, w, patches.shape[-1])
        windows = grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (crops, windows, h * w, joined)
        query = self.wq(windows.mean(2, keepdim=True))
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(2, 3) for x in (query, self.wk(windows), self.wv(windows))
        )
        pooled = nn.functional.scaled_dot_product_attention(q, k, v)  # (crops, windows, heads, 1, head)
        out: Tensor = self.wo(pooled.flatten(2))
        return out


class MolmoEProjector(nn.Module):
    """A gated MLP from the tower's width to the decoder's."""

    def __init__(self, config: MolmoEConfig) -> None:
        super().__init__()
        width, inner = config.vision_config.hidden_size, config.text_config.intermediate_size
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, config.text_config.hidden_size, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., vision width) to (..., hidden)."""
        out: Tensor = self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))
        return out


class MolmoEVisionBackbone(nn.Module):
    """Everything between crops and the tokens that are added to the decoder's input."""

    def __init__(self, config: MolmoEConfig) -> None:
        super().__init__()
        self.layers = config.vit_layers
        self.image_vit = MolmoEVisionModel._from_config(config.vision_config)
        self.pad_embed = nn.Parameter(torch.empty(2, config.vision_config.hidden_size * len(config.vit_layers)))
        self.image_pooling_2d = MolmoEPooling(config)
        self.image_projector = MolmoEProjector(config)

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        """Tokens of crops.

        Args:
            images: (crops, n * n, pixels of a patch); a crop with a value of -1 is padding and gives no features.
            masks: (crops, n * n), the share of each patch that is image: 0 nothing, 1 all, -1 where it is not known.

        Returns:
            (crops, windows, hidden).
        """
        real = ~(images == PADDING).any(-1).any(-1)
        features = self.image_vit.features(images[real], self.layers)
        patches = features.new_zeros(len(images), *features.shape[1:]).masked_scatter(real[:, None, None], features)
        nothing, partly = masks == 0, (masks < 1) & (masks != 0)
        patches = patches + self.pad_embed[0] * nothing[..., None] + self.pad_embed[1] * partly[..., None]
        tokens: Tensor = self.image_projector(self.image_pooling_2d(patches))
        return tokens


class MolmoEModel(nn.Module):
    """The decoder and the tower, as the checkpoint nests them."""

    def __init__(self, config: MolmoEConfig) -> None:
        super().__init__()
        self.transformer = MolmoETextModel._from_config(config.text_config)
        self.vision_backbone = MolmoEVisionBackbone(config)


class MolmoEForConditionalGeneration(PreTrainedModel, ImagesInPrompt, GenerationMixin):
    """MolmoE with its language-modeling head."""

    image_inputs = ("images", "image_masks", "image_input_idx")
    config_class = MolmoEConfig
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["CLIPEncoderLayer", "OlmoeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MolmoEConfig) -> None:
        super().__init__(config)
        self.model = MolmoEModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.head_rows, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MolmoEVisionBackbone):
            nn.init.normal_(module.pad_embed, std=self.config.text_config.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding, with rows that the head lacks."""
        table: nn.Module = self.model.transformer.embed_tokens
        return table

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.model.transformer.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        images: Tensor | None = None,
        image_masks: Tensor | None = None,
        image_input_idx: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> VisionLanguageOutput:
        """Logits of text with images.

        Args:
            input_ids: (sequences, length); -1 is padding.
            attention_mask: (sequences, length), 0 at padding; None takes it from ``input_ids``.
            position_ids: (sequences, length).
            past_key_values: cache of what came before.
            inputs_embeds: (sequences, length, hidden) instead of ``input_ids``.
            images: (sequences, crops, n * n, pixels of a patch), all -1 in crops that fill up.
            image_masks: (sequences, crops, n * n), see :meth:`MolmoEVisionBackbone.forward`.
            image_input_idx: int (sequences, crops, windows), the token to which each window's features are added,
                negative for none.
            labels: (sequences, length), -100 where nothing is learned; shifted by the loss.
            use_cache: return a cache.
            logits_to_keep: only the last so many positions, 0 for all.
            kwargs: for the decoder.

        Raises:
            InputError: images without their masks and indices, or indices beyond the sequence.
        """
        if inputs_embeds is None and input_ids is not None:
            if attention_mask is None and past_key_values is None and bool((input_ids < 0).any()):
                attention_mask = (input_ids >= 0).long()
            inputs_embeds = self.get_input_embeddings()(input_ids.clamp_min(0))
        if images is not None:
            inputs_embeds = self._with_images(inputs_embeds, images, image_masks, image_input_idx)
        outputs = self.model.transformer(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return with_head(self, self.lm_head, outputs, labels, logits_to_keep, **kwargs)

    def get_image_features(self, images: Tensor, masks: Tensor) -> Tensor:
        """Features (sequences, windows of all crops, hidden) of ``images`` and ``image_masks``."""
        features = self.model.vision_backbone(images.flatten(0, 1), masks.flatten(0, 1))
        made: Tensor = features.reshape(len(images), -1, features.shape[-1])
        return made

    def _with_images(self, embeddings: Any, images: Tensor, masks: Tensor | None, places: Tensor | None) -> Tensor:
        """Token embeddings (sequences, length, hidden) with the features of windows added at their places."""
        if masks is None or places is None:
            raise InputError("images come without image_masks or image_input_idx; give all three as the processor does")
        length = embeddings.shape[1]
        if int(places.max()) >= length:
            raise InputError(
                f"image_input_idx has {int(places.max())} in a sequence of {length} tokens; "
                "give the tokens that the processor made with it, whole"
            )
        features = self.get_image_features(images, masks)
        places = places.flatten(1)
        used = places >= 0  # first, because a negative place plus its row's offset would be one of the row before
        rows = torch.arange(len(images), device=places.device)[:, None] * length + places
        flat = embeddings.flatten(0, 1).index_add(0, rows[used], features[used].to(embeddings.dtype))
        added: Tensor = flat.view_as(embeddings)
        return added
