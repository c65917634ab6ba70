"""The processor of MolmoE: overlapping crops, pooled token grid and prompt, as the published code makes them.

An image becomes one low-resolution crop of the whole and, on a canvas of as many windows as fit it, overlapping crops;
every crop's margins are seen by the tower and dropped from the token grid. The published code gives every image of a
prompt the same place, so that only one image is meaningful, and more are refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.utils.hub import cached_file

from mopeq.errors import InputError, ModelError
from mopeq.models.conversation import Turn
from mopeq.models.images import open_image
from mopeq.models.processing import Row, VisionProcessor

__all__ = ["MolmoProcessor", "crops_of", "resized", "tiling"]

Pair = tuple[int, int]
POOLED = 2
"""Patches a side that become one token."""
UNUSED = -100
"""In ``image_input_idx``: a window that is no token."""
SETTINGS = "preprocessor_config.json"


def tiling(size: Pair, window: int, most: int) -> Pair:
    """(rows, columns) of windows, at most ``most`` in all, for an image of ``size`` = (height, width) less margins.

    The smallest enlargement that fills the windows wins, or the mildest reduction where all would reduce.
    """
    grids = [(r, c) for r in range(1, most + 1) for c in range(1, most // r + 1)]
    grids.sort(key=lambda grid: (grid[0] * grid[1], grid[0]))
    with np.errstate(divide="ignore"):  # an image no larger than its margins
        scales = np.asarray(grids, np.float32) * np.float32(window) / np.asarray(size, np.float32)
    needed = scales.min(axis=1)
    if (needed < 1).all():
        return grids[int(needed.argmax())]
    return grids[int(np.where(needed < 1, np.inf, needed).argmin())]


def resized(pixels: np.ndarray, size: Pair) -> tuple[np.ndarray, np.ndarray]:
    """An image on a canvas, not distorted, in its middle.

    Args:
        pixels: uint8 (height, width, 3).
        size: (height, width) of the canvas.

    Returns:
        float32 (height, width, 3) from 0 to 1, zero in the margins, and bool (height, width), false there.
    """
    old = np.asarray(pixels.shape[:2], np.float32)
    scale = (np.asarray(size, np.float32) / old).min()
    height, width = (int(side) for side in old * scale)
    planes = torch.from_numpy(pixels).permute(2, 0, 1).float().div(255)
    planes = torch.nn.functional.interpolate(
        planes[None], (height, width), mode="bilinear", align_corners=False, antialias=True
    )[0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    canvas, inside = np.zeros((*size, 3), np.float32), np.zeros(size, bool)
    canvas[top : top + height, left : left + width] = planes.clamp(0, 1).permute(1, 2, 0).numpy()
    inside[top : top + height, left : left + width] = True
    return canvas, inside


def patches_of(pixels: np.ndarray, patch: int) -> np.ndarray:
    """(height, width, channels) to (patches, values of a patch), row by row, values ordered (y, x, channel)."""
    height, width, channels = pixels.shape
    grid = pixels.reshape(height // patch, patch, width // patch, patch, channels).swapaxes(1, 2)
    return grid.reshape(-1, patch * patch * channels)


def crops_of(canvas: np.ndarray, side: int, stride: int) -> list[np.ndarray]:
    """Square crops of a canvas (height, width, ...) row by row, each ``side`` wide, ``stride`` apart."""
    height, width = canvas.shape[:2]
    tops, lefts = range(0, height - side + 1, stride), range(0, width - side + 1, stride)
    return [canvas[top : top + side, left : left + side] for top in tops for left in lefts]


class MolmoProcessor(VisionProcessor):
    """Text, one image and conversations to the inputs of MolmoE.

    Args:
        tokenizer: the model's.
        max_crops: most local crops of an image.
        overlap_margins: patches of a crop that overlap its neighbours, before and after.
        base_image_input_size: (height, width) of a crop.
        image_token_length_w: tokens of a crop's row.
        image_token_length_h: tokens of a crop's column.
        image_patch_size: of the vision tower.
        image_padding_mask: must be true.
        do_normalize: must be true.
        image_mean: of each channel.
        image_std: of each channel.

    Raises:
        ModelError: settings that the published model does not have, or a tokenizer without its special tokens.
    """

    tensors: ClassVar[tuple[str, ...]] = ("images", "image_masks", "image_input_idx")

    def __init__(
        self,
        tokenizer: Any,
        max_crops: int = 12,
        overlap_margins: Sequence[int] = (4, 4),
        base_image_input_size: Sequence[int] = (336, 336),
        image_token_length_w: int = 12,
        image_token_length_h: int = 12,
        image_patch_size: int = 14,
        image_padding_mask: bool = True,
        do_normalize: bool = True,
        image_mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
        image_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
    ) -> None:
        self.side, self.patch, self.margin = (
            int(base_image_input_size[0]),
            int(image_patch_size),
            int(overlap_margins[0]),
        )
        self.tokens = self.side // self.patch // POOLED
        for name, found, expected in (
            ("image_padding_mask", image_padding_mask, True),
            ("do_normalize", do_normalize, True),
            ("base_image_input_size", [*base_image_input_size], [self.side] * 2),
            ("overlap_margins", [*overlap_margins], [self.margin] * 2),
            ("image_token_length_w", image_token_length_w, self.tokens),
            ("image_token_length_h", image_token_length_h, self.tokens),
        ):
            if found != expected:
                raise ModelError(f"{SETTINGS} has {name} {found!r}; expected {expected!r}; use the model's own file")
        self.max_crops = int(max_crops)
        self.image_mean, self.image_std = [*image_mean], [*image_std]
        super().__init__(tokenizer)
        ids = [self._special(token) for token in ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>")]
        self.image_token = "<|image|>"
        self.image_token_ids = [*ids[:4]]
        self.start_id, self.end_id, self.patch_id, self.column_id = ids[:4]
        for name in ("eos_token", "pad_token"):
            if getattr(tokenizer, name) is None:
                raise ModelError(
                    f"the tokenizer has no {name}; expected MolmoE's; give the model's own tokenizer files"
                )
        tokenizer.bos_token = tokenizer.eos_token  # as the published code takes it

    def _special(self, token: str) -> int:
        number = self.tokenizer.get_vocab().get(token)
        if number is None:
            raise ModelError(f"the tokenizer lacks {token}; expected MolmoE's; give the model's own tokenizer files")
        return int(number)

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings, which the published model keeps in ``preprocessor_config.json``."""
        found, rest = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if not found:
            names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
            options = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            path = cached_file(pretrained_model_name_or_path, SETTINGS, **options)
            with open(str(path), encoding="utf-8") as handle:
                found = json.load(handle)
        found.pop("image_processor_type", None)
        return found, rest

    def to_dict(self) -> dict[str, Any]:
        """The settings."""
        return {
            "max_crops": self.max_crops,
            "overlap_margins": [self.margin] * 2,
            "base_image_input_size": [self.side] * 2,
            "image_token_length_w": self.tokens,
            "image_token_length_h": self.tokens,
            "image_patch_size": self.patch,
            "image_padding_mask": True,
            "do_normalize": True,
            "image_mean": self.image_mean,
            "image_std": self.image_std,
            "processor_class": type(self).__name__,
        }

    def _pieces(self, turns: Sequence[Turn]) -> list[tuple[str, bool]]:
        """`` User: ... Assistant:`` and answers after a space; the published code only has the first question."""
        made = []
        for number, turn in enumerate(turns):
            if turn.role == "system":
                raise InputError("a system message; MolmoE has none; put it into the user's first message")
            if number and turn.images:
                raise InputError("an image after the first message; MolmoE sees one before all text; put it there")
            words = turn.text.replace(f"{self.image_token}\n", "").replace(self.image_token, "").strip()
            if turn.role == "user":
                made.append((f"{self.image_token * len(turn.images)} User: {words} Assistant:", False))
            elif words or number + 1 < len(turns):
                made.append((f" {words}", True))
        return made

    def _row(self, pieces: Sequence[tuple[str, bool]], images: Sequence[Any]) -> Row:
        if len(images) > 1:
            raise InputError(f"{len(images)} images in one conversation; MolmoE takes one; leave the others out")
        row = Row()
        row.add([self.tokenizer.eos_token_id])
        for source in images:
            self._add_image(row, open_image(source, ratio=self.side))
        for words, answer in pieces:
            row.add(self.tokenizer.encode(words.replace(self.image_token, ""), add_special_tokens=False), answer)
            if answer:
                row.add([self.tokenizer.eos_token_id], True)
        return row

    def image_row(self, source: Any) -> Row:
        """One image by itself: its tokens, crops, masks and places."""
        row = Row()
        self._add_image(row, open_image(source, ratio=self.side))
        return row

    def image_tokens(self, size: Pair) -> list[int]:
        """The tokens of an image of ``size`` = (height, width)."""
        row = Row()
        self._add_tokens(row, self._grid(size))
        return row.ids

    def _grid(self, size: Pair) -> Pair:
        margins = 2 * self.margin * self.patch
        return tiling((size[0] - margins, size[1] - margins), self.side - margins, self.max_crops)

    def _add_image(self, row: Row, image: Image.Image) -> None:
        """The image's tokens, its crops, their masks and the places of their windows."""
        pixels = np.array(image)
        margins = 2 * self.margin * self.patch
        window = self.side - margins
        grid = self._grid((pixels.shape[0], pixels.shape[1]))
        whole, _ = resized(pixels, (self.side, self.side))
        canvas, inside = resized(pixels, (grid[0] * window + margins, grid[1] * window + margins))
        views = [whole, *crops_of(canvas, self.side, window)]
        mean, std = np.asarray(self.image_mean, np.float32), np.asarray(self.image_std, np.float32)
        images = np.stack([patches_of((view - mean) / std, self.patch) for view in views])
        masks = np.full(images.shape[:2], -1, np.float32)
        for number, part in enumerate(crops_of(inside, self.side, window)):
            # row n has the mask of local crop n, though crop 0 of images is the whole: as the model was trained
            masks[number] = patches_of(part[..., None].astype(np.float32), self.patch).mean(-1)
        places = self._add_tokens(row, grid)
        row.images.append((images, masks, places))

    def _add_tokens(self, row: Row, grid: Pair) -> np.ndarray:
        """Append the tokens of both views; returns int64 (crops, windows), the place of each window or UNUSED."""
        step = (self.side // self.patch - 2 * self.margin) // POOLED
        dropped, n = self.margin // POOLED, self.tokens
        height, width = (step * count + 2 * dropped for count in grid)
        first = len(row.ids) + 1 + np.arange(n)[:, None] * (n + 1) + np.arange(n)
        self._add_view(row, n, n)
        second = len(row.ids) + 1 + np.arange(height)[:, None] * (width + 1) + np.arange(width)
        self._add_view(row, height, width)
        places = [first]
        for i in range(grid[0]):
            for j in range(grid[1]):
                own = np.full((n, n), UNUSED)
                y, x = (
                    slice(0 if at == 0 else dropped, n if at + 1 == count else n - dropped)
                    for at, count in zip((i, j), grid, strict=True)
                )
                own[y, x] = second[step * i : step * i + n, step * j : step * j + n][y, x]
                places.append(own)
        return np.stack(places).reshape(len(places), -1)

    def _add_view(self, row: Row, height: int, width: int) -> None:
        line = [self.patch_id] * width + [self.column_id]
        row.add([self.start_id, *(line * height), self.end_id])

    def _image_tensors(self, rows: Sequence[Row], ids: Tensor) -> dict[str, Tensor]:
        """The three tensors of the model, filled up with -1.

        images: float32 (sequences, crops, patches, values); image_masks: float32 (sequences, crops, patches), the share
        of each patch that is image; image_input_idx: int64 (sequences, crops, windows), the token that each window adds
        to, negative for none.
        """
        made: list[Tensor] = []
        for which in range(3):
            arrays = [row.images[0][which] if row.images else None for row in rows]
            shape = next(array.shape[1:] for array in arrays if array is not None)
            crops = max(len(array) for array in arrays if array is not None)
            kind = torch.int64 if which == 2 else torch.float32
            filled = torch.full((len(rows), crops, *shape), -1, dtype=kind)
            for number, (array, row) in enumerate(zip(arrays, rows, strict=True)):
                if array is not None:
                    part = torch.from_numpy(array)
                    if which == 2:
                        part = torch.where(part >= 0, part + ids.shape[1] - len(row.ids), part)
                    filled[number, : len(part)] = part
            made.append(filled)
        return dict(zip(self.tensors, made, strict=True))
