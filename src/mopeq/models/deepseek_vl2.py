"""DeepSeek-VL2: a SigLIP tower, a projector that joins 2x2 patches, and a DeepSeek decoder.

Modules that the published checkpoints name keep those names (``vision``, ``projector``, ``language``,
``image_newline``, ``view_seperator`` with its spelling), so that only the tower's inner names and the fused experts
need a mapping (conversion.py). Source: arXiv 2412.10302 and the code of deepseek-ai/DeepSeek-VL2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV2Model, DeepseekV3Model, GenerationMixin, PreTrainedModel, SiglipVisionModel
from transformers.cache_utils import Cache
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2TextModel
from transformers.utils.generic import can_return_tuple

from mopeq.errors import InputError
from mopeq.models.configuration import DeepseekVL2Config
from mopeq.models.shared import ImagesInPrompt, VisionLanguageOutput, padded_mask, with_head

__all__ = ["DeepseekVL2ForConditionalGeneration"]


class DeepseekVL2VisionModel(SiglipVisionModel):
    """SigLIP under a name of its own, for which conversion.py has the published names."""


class DeepseekVL2TextModel(DeepseekOcr2TextModel):
    """The decoder with plain attention, under a name of its own as well."""


DECODERS: dict[str, type[PreTrainedModel]] = {
    "deepseek_ocr2_text": DeepseekVL2TextModel,  # plain attention
    "deepseek_v2": DeepseekV2Model,  # latent attention, softmax router
    "deepseek_v3": DeepseekV3Model,  # latent attention, sigmoid router with a correction of the choice
}


class DeepseekVL2Projector(nn.Module):
    """Patches of a square grid to fewer tokens of the decoder's width: ratio x ratio patches become one token."""

    def __init__(self, config: DeepseekVL2Config) -> None:
        super().__init__()
        self.ratio = config.downsample_ratio
        width = config.text_config.hidden_size
        joined = config.vision_config.hidden_size * self.ratio**2
        self.layers = nn.Sequential(nn.Linear(joined, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, patches: Tensor) -> Tensor:
        """(tiles, n * n, vision width) to (tiles, m, m, decoder width), m = ceil(n / ratio); short sides get zeros."""
        side = int(patches.shape[1] ** 0.5)
        grid = patches.mT.unflatten(-1, (side, side))  # (tiles, width, n, n)
        short = -side % self.ratio
        grid = nn.functional.pad(grid, (0, short, 0, short))
        joined = nn.functional.unfold(grid, self.ratio, stride=self.ratio).mT  # channels outermost within a token
        tokens: Tensor = self.layers(joined).unflatten(1, ((side + short) // self.ratio,) * 2)
        return tokens


class DeepseekVL2Language(nn.Module):
    """The decoder and its head."""

    def __init__(self, config: DeepseekVL2Config) -> None:
        super().__init__()
        self.model = DECODERS[config.text_config.model_type]._from_config(config.text_config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)


class DeepseekVL2ForConditionalGeneration(PreTrainedModel, ImagesInPrompt, GenerationMixin):
    """DeepSeek-VL2 with its language-modeling head."""

    image_inputs = ("images", "images_seq_mask", "images_spatial_crop")
    config_class = DeepseekVL2Config
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "SiglipEncoderLayer",
        "DeepseekOcr2TextDecoderLayer",
        "DeepseekV2DecoderLayer",
        "DeepseekV3DecoderLayer",
    ]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # the published tower's pooling head, which nothing calls
    _keys_to_ignore_on_load_unexpected = [r"^vision\.attn_pool\."]

    def __init__(self, config: DeepseekVL2Config) -> None:
        super().__init__(config)
        width = config.text_config.hidden_size
        self.vision = DeepseekVL2VisionModel._from_config(config.vision_config)
        self.projector = DeepseekVL2Projector(config)
        self.image_newline = nn.Parameter(torch.empty(width))
        self.view_seperator = nn.Parameter(torch.empty(width))
        self.language = DeepseekVL2Language(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DeepseekVL2ForConditionalGeneration):
            for vector in (module.image_newline, module.view_seperator):
                nn.init.normal_(vector, std=vector.numel() ** -0.5)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        table: nn.Module = self.language.model.get_input_embeddings()
        return table

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.language.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.language.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the head."""
        self.language.lm_head = value

    def get_image_features(self, images: Tensor, images_spatial_crop: Tensor) -> Tensor:
        """The token sequences of all images of all sequences, in order.

        Args:
            images: (sequences, tiles, 3, side, side), of each image its global view, then its tiles row by row;
                sequences with fewer tiles are filled up at the end.
            images_spatial_crop: int (sequences, images, 2), of each image its tiles across and down; (0, 0) is none.

        Returns:
            (image tokens, hidden): of each image the global view's rows with a newline after each, the separator, and
            the rows of the tiles put together with a newline after each.
        """
        crops = [[(w, h) for w, h in row if w and h] for row in images_spatial_crop.tolist()]
        counts = [sum(1 + w * h for w, h in row) for row in crops]
        if max(counts) > images.shape[1]:
            raise InputError(
                f"images has {images.shape[1]} tiles a sequence, images_spatial_crop asks for {max(counts)}; "
                "give both as the processor made them"
            )
        tiles = torch.cat([row[:n] for row, n in zip(images, counts, strict=True)])
        views = self.projector(self.vision(tiles.to(self.vision.dtype)).last_hidden_state)  # (tiles, m, m, hidden)
        parts: list[Tensor] = []
        first = 0
        for w, h in (crop for row in crops for crop in row):
            whole, local = views[first], views[first + 1 : first + 1 + w * h]
            m = len(whole)
            local = local.unflatten(0, (h, w)).transpose(1, 2).reshape(h * m, w * m, -1)
            parts += [self._lines(whole), self.view_seperator[None], self._lines(local)]
            first += 1 + w * h
        return torch.cat(parts)

    def _lines(self, grid: Tensor) -> Tensor:
        """(rows, columns, hidden) to (rows * (columns + 1), hidden), a newline after each row."""
        newline = self.image_newline.expand(len(grid), 1, -1)
        return torch.cat([grid, newline], dim=1).flatten(0, 1)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        images: Tensor | None = None,
        images_seq_mask: Tensor | None = None,
        images_spatial_crop: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> VisionLanguageOutput:
        """Logits of text with images.

        Args:
            input_ids: (sequences, length), where images go any token, which is replaced.
            attention_mask: (sequences, length), 0 at padding.
            position_ids: (sequences, length).
            past_key_values: cache of what came before.
            inputs_embeds: (sequences, length, hidden) instead of ``input_ids``.
            images: (sequences, tiles, 3, side, side), see :meth:`get_image_features`.
            images_seq_mask: (sequences, length), nonzero where image tokens go.
            images_spatial_crop: (sequences, images, 2); all zero where there is no image.
            labels: (sequences, length), -100 where nothing is learned; shifted by the loss.
            use_cache: return a cache.
            logits_to_keep: only the last so many positions, 0 for all.
            kwargs: for the decoder.

        Raises:
            InputError: the mask and the images do not ask for as many tokens.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        inputs_embeds = self._with_images(inputs_embeds, images, images_seq_mask, images_spatial_crop)
        outputs = self.language.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return with_head(self, self.language.lm_head, outputs, labels, logits_to_keep, **kwargs)

    def _with_images(
        self, embeddings: Tensor, images: Tensor | None, mask: Tensor | None, crops: Tensor | None
    ) -> Tensor:
        """Token embeddings (sequences, length, hidden), those of the mask replaced by the images' tokens."""
        wanted = 0 if mask is None else int(mask.bool().sum())
        given = images is not None and crops is not None and bool(crops.any())
        if not given and not wanted:
            return embeddings
        if images is None or crops is None or not given:
            raise InputError(f"{wanted} tokens stand for images and no images are given; give images, or only text")
        features = self.get_image_features(images, crops)
        if mask is None or len(features) != wanted:
            raise InputError(
                f"images make {len(features)} tokens, images_seq_mask has room for {wanted}; "
                "give both as the processor made them"
            )
        places = padded_mask(mask, embeddings.shape[1])[..., None].expand_as(embeddings)
        return embeddings.masked_scatter(places, features.to(embeddings))
