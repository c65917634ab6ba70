"""The processor of DeepSeek-VL2: tiles, token layout and conversations, as the published code makes them.

An image becomes a global view and, on a canvas of the candidate resolution that keeps most of it, local tiles; more
than two images in one prompt are not tiled. Each turn's text is tokenized on its own, and so is what stands between
two images, so that a conversation gives the tokens the models were trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mopeq.errors import InputError, ModelError
from mopeq.models.conversation import Turn
from mopeq.models.images import open_image
from mopeq.models.processing import Row, VisionProcessor

__all__ = ["DeepseekVLV2Processor", "best_resolution", "image_token_count", "tiles_of"]

Pair = tuple[int, int]
TILED_IMAGES = 2
"""Most images of a prompt that are cut into tiles."""
GROUNDING_TOKENS = ("<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>")
CHAT_TOKENS = ("<|User|>", "<|Assistant|>")


def best_resolution(size: Pair, candidates: Sequence[Pair]) -> Pair:
    """The candidate (width, height) that keeps most pixels of an image of ``size``; the least waste breaks ties."""
    width, height = size

    def merit(candidate: Pair) -> tuple[int, int]:
        scale = min(candidate[0] / width, candidate[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - candidate[0] * candidate[1]

    return max(candidates, key=merit)


def image_token_count(crop: Pair, side: int) -> int:
    """Tokens of an image of ``crop`` = (width, height) tiles, each ``side`` x ``side`` tokens, with its line breaks."""
    return side * (side + 1) + 1 + crop[1] * side * (crop[0] * side + 1)


def tiles_of(image: Image.Image, canvas: Pair, tile: int, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """The global view, then the tiles of the canvas row by row: float32 (1 + tiles, 3, tile, tile), normalised.

    Args:
        image: RGB.
        canvas: (width, height) of the local view, multiples of ``tile``.
        tile: pixels of a tile's side.
        mean: of each channel, 0 to 1; also the colour of the margins.
        std: of each channel.
    """
    colour = (int(mean[0] * 255), int(mean[1] * 255), int(mean[2] * 255))
    local = ImageOps.pad(image, canvas, color=colour)
    views = [ImageOps.pad(image, (tile, tile), color=colour)]
    for top in range(0, canvas[1], tile):
        views += [local.crop((left, top, left + tile, top + tile)) for left in range(0, canvas[0], tile)]
    pixels: np.ndarray = np.stack([np.asarray(view) for view in views]).astype(np.float32) / np.float32(255)
    pixels = ((pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)).astype(np.float32)
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


class DeepseekVLV2Processor(VisionProcessor):
    """Text, images and conversations to the inputs of DeepSeek-VL2.

    Args:
        tokenizer: the model's; special tokens that it lacks are added, in the order of the published code.
        candidate_resolutions: (width, height) pairs of local canvases; the first is one tile.
        patch_size: of the vision tower.
        downsample_ratio: of the projector.
        image_mean: of each channel, 0 to 1.
        image_std: of each channel.
        normalize: must be true.
        image_token: marks an image in a text.
        pad_token: used where the tokenizer has none.
        add_special_token: must be false.
        sft_format: must be ``deepseek``.
        mask_prompt: not used; training code's.
        ignore_id: not used; training code's.

    Raises:
        ModelError: settings that the published models do not have, or a tokenizer that cannot be theirs.
    """

    tensors: ClassVar[tuple[str, ...]] = ("images", "images_seq_mask", "images_spatial_crop")

    def __init__(
        self,
        tokenizer: Any,
        candidate_resolutions: Sequence[Sequence[int]] = (),
        patch_size: int = 14,
        downsample_ratio: int = 2,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        normalize: bool = True,
        image_token: str = "<image>",
        pad_token: str = "<｜▁pad▁｜>",
        add_special_token: bool = False,
        sft_format: str = "deepseek",
        mask_prompt: bool = True,
        ignore_id: int = -100,
    ) -> None:
        for name, found, expected in (
            ("normalize", normalize, True),
            ("add_special_token", add_special_token, False),
            ("sft_format", sft_format, "deepseek"),
        ):
            if found != expected:
                raise ModelError(f"processor_config.json has {name} {found!r}; expected {expected!r}; set it so")
        self.candidate_resolutions = [(int(w), int(h)) for w, h in candidate_resolutions]
        if not self.candidate_resolutions or self.candidate_resolutions[0][0] != self.candidate_resolutions[0][1]:
            raise ModelError(
                f"candidate_resolutions are {self.candidate_resolutions[:3]}; expected pairs, the first one square tile"
            )
        self.patch_size, self.downsample_ratio = patch_size, downsample_ratio
        self.image_mean, self.image_std = [*image_mean], [*image_std]
        self.normalize, self.add_special_token, self.sft_format = normalize, add_special_token, sft_format
        self.mask_prompt, self.ignore_id = mask_prompt, ignore_id
        self.image_token, self.pad_token = image_token, pad_token
        self.tile = self.candidate_resolutions[0][0]
        self.side = -(-(self.tile // patch_size) // downsample_ratio)
        _complete(tokenizer, image_token, pad_token)
        super().__init__(tokenizer)
        self.image_token_id = int(tokenizer.convert_tokens_to_ids(image_token))
        self.image_token_ids = [self.image_token_id]

    def to_dict(self) -> dict[str, Any]:
        """The settings, as ``processor_config.json`` has them."""
        names = (
            "candidate_resolutions", "patch_size", "downsample_ratio", "image_mean", "image_std", "normalize",
            "image_token", "pad_token", "add_special_token", "sft_format", "mask_prompt", "ignore_id",
        )  # fmt: skip
        return {**{name: getattr(self, name) for name in names}, "processor_class": type(self).__name__}

    def _pieces(self, turns: Sequence[Turn]) -> list[tuple[str, bool]]:
        """Texts that are tokenized each on its own, and whether they are answers, which an end token follows."""
        made = []
        for number, turn in enumerate(turns):
            words = turn.text.strip()
            if turn.role == "user":
                made.append((f"{CHAT_TOKENS[0]}: {words}\n\n{CHAT_TOKENS[1]}:", False))
            elif turn.role == "assistant":
                if words or number + 1 < len(turns):  # the published code asks for an answer by an empty one
                    made.append((words, True))
            elif number:
                raise InputError("a system message after another; expected it first; put it there")
            else:
                made.append((words, False))
        return made

    def _row(self, pieces: Sequence[tuple[str, bool]], images: Sequence[Any]) -> Row:
        row = Row()
        row.add([self.tokenizer.bos_token_id])
        waiting = list(images)
        for words, answer in pieces:
            for number, part in enumerate(words.split(self.image_token)):
                if number:
                    self._add_image(row, waiting.pop(0), len(images))
                row.add(self.tokenizer.encode(part, add_special_tokens=False), answer)
            if answer:
                row.add([self.tokenizer.eos_token_id], True)
        return row

    def _add_image(self, row: Row, source: Any, images: int) -> None:
        image = open_image(source, ratio=self.tile)
        tile = (self.tile, self.tile)
        canvas = best_resolution(image.size, self.candidate_resolutions) if images <= TILED_IMAGES else tile
        crop = (canvas[0] // self.tile, canvas[1] // self.tile)
        row.images.append((tiles_of(image, canvas, self.tile, self.image_mean, self.image_std), crop))
        row.add([self.image_token_id] * image_token_count(crop, self.side))

    def _image_tensors(self, rows: Sequence[Row], ids: Tensor) -> dict[str, Tensor]:
        """The three tensors of the model, filled up with zeros.

        images: float32 (sequences, tiles, 3, side, side); images_spatial_crop: int64 (sequences, images, 2), the
        (width, height) tiles of each image; images_seq_mask: bool (sequences, length), true at image tokens.
        """
        most = max(sum(len(tiles) for tiles, _ in row.images) for row in rows)
        pixels = torch.zeros(len(rows), most, 3, self.tile, self.tile)
        crops = torch.zeros(len(rows), max(len(row.images) for row in rows), 2, dtype=torch.int64)
        for number, row in enumerate(rows):
            if row.images:
                tiles = np.concatenate([tiles for tiles, _ in row.images])
                pixels[number, : len(tiles)] = torch.from_numpy(tiles)
                crops[number, : len(row.images)] = torch.tensor([crop for _, crop in row.images])
        return {"images": pixels, "images_seq_mask": ids == self.image_token_id, "images_spatial_crop": crops}


def _complete(tokenizer: Any, image_token: str, pad_token: str) -> None:
    """Give the tokenizer the special tokens that it lacks: they come after its own, in this order."""
    for name in ("bos_token", "eos_token"):
        if getattr(tokenizer, name) is None:
            raise ModelError(
                f"the tokenizer has no {name}; expected DeepSeek-VL2's; give the model's own tokenizer files"
            )
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": pad_token})
    known = tokenizer.get_vocab()
    missing = [token for token in (image_token, *GROUNDING_TOKENS, *CHAT_TOKENS) if token not in known]
    tokenizer.add_tokens(missing, special_tokens=True)
