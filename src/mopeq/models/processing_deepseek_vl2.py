"""The processor of DeepSeek-VL2: tiles, token layout and conversations, as the published code makes them.

An image becomes a global view and, on a canvas of the candidate resolution that keeps most of it, local tiles; more
than two images in one prompt are not tiled. Each turn's text is tokenized on its own, and so is what stands between
two images, so that a conversation gives the tokens the models were trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mopeq.errors import DataError, InputError, ModelError
from mopeq.models.conversation import Turn, conversations, images_of, turns_of
from mopeq.models.images import open_image

import torch  # isort: skip
from transformers import BatchFeature, ProcessorMixin  # isort: skip

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
    pixels = np.stack([np.asarray(view) for view in views]).astype(np.float32) / np.float32(255)
    pixels = (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


@dataclass
class _Row:
    """One sequence: token ids, which of them are answers, the tiles of its images and how many each has."""

    ids: list[int] = field(default_factory=list)
    answer: list[bool] = field(default_factory=list)
    tiles: list[np.ndarray] = field(default_factory=list)
    crops: list[Pair] = field(default_factory=list)

    def add(self, ids: Sequence[int], answer: bool = False) -> None:
        self.ids += ids
        self.answer += [answer] * len(ids)


class DeepseekVLV2Processor(ProcessorMixin):
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
        vocab_size: rows of the model's embedding, to check the special tokens by; None checks nothing.

    Raises:
        ModelError: settings that the published models do not have, or a tokenizer that cannot be theirs.
    """

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
        vocab_size: int | None = None,
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
        _complete(tokenizer, image_token, pad_token, vocab_size)
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

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        *,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        **options: Any,
    ) -> BatchFeature:
        """Raw text, begin-of-sentence token first, with image tokens where the images belong.

        Args:
            images: what :func:`mopeq.models.images.open_image` takes: one, a list of them, or one list for each text.
            text: one or several.
            videos: refused.
            return_tensors: only ``pt``.
            padding: of several texts, on the left; False refuses texts of different lengths.
            options: of transformers' callers; not used.

        Returns:
            ``input_ids`` and ``attention_mask`` int64 (texts, length), and where there are images what
            :meth:`collate` says.
        """
        if videos is not None:
            raise InputError("videos; this model takes images; give some of their frames as images")
        texts = [text] if isinstance(text, str) else list(text or ())
        if not texts:
            raise InputError("no text; expected at least one, with an image token for each image")
        begin = str(self.tokenizer.bos_token)
        rows = []
        for words, own in zip(texts, _nested(images, len(texts)), strict=True):
            tokens = words.count(self.image_token)
            if tokens != len(own):
                raise DataError(
                    f"the text has {tokens} times {self.image_token} and there are {len(own)} images; expected as "
                    "many; add what is missing, or take the other out"
                )
            rows.append(self._row([(words.removeprefix(begin), False)], own))
        return self.collate(rows, return_tensors=return_tensors, padding=padding)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        add_generation_prompt: bool = False,
        return_tensors: str | None = "pt",
        return_assistant_tokens_mask: bool = False,
        padding: bool | str = True,
        **options: Any,
    ) -> Any:
        """One conversation or several, each ending with what the user says or with an answer.

        A user's turn always ends with the assistant's header, as the models know it, so that ``add_generation_prompt``
        changes nothing. What the messages look like: :func:`mopeq.models.conversation.turns_of`.

        Returns:
            The text, or with ``tokenize`` token ids, or with ``return_dict`` what :meth:`__call__` gives and, if asked
            for, ``assistant_masks`` int64 (conversations, length), 1 at answers and their end-of-sentence token.
        """
        if chat_template is not None:
            raise InputError("a chat template; this model has one fixed form of conversation; leave it out")
        batch = [turns_of(messages, self.image_token) for messages in conversations(conversation)]
        if not tokenize:
            texts = [self.tokenizer.bos_token + "".join(self._text(turns)) for turns in batch]
            return texts if len(batch) > 1 or not isinstance(conversation[0], Mapping) else texts[0]
        rows = [self._row(self._pieces(turns), images_of(turns)) for turns in batch]
        made = self.collate(
            rows, return_tensors=return_tensors, padding=padding, answers=return_assistant_tokens_mask
        )
        return made if return_dict else made["input_ids"]

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

    def _text(self, turns: Sequence[Turn]) -> list[str]:
        return [words + (self.tokenizer.eos_token if answer else "") for words, answer in self._pieces(turns)]

    def _row(self, pieces: Sequence[tuple[str, bool]], images: Sequence[Any]) -> _Row:
        row = _Row()
        row.add([self.tokenizer.bos_token_id])
        waiting = list(images)
        for words, answer in pieces:
            for number, part in enumerate(words.split(self.image_token)):
                if number:
                    self._add_image(row, waiting.pop(0), len(images))
                row.add(self.tokenizer.encode(part, add_special_tokens=False), answer)
            if answer:
                row.add([self.tokenizer.eos_token_id], True)
        most = int(self.tokenizer.model_max_length)
        if len(row.ids) > most:
            raise DataError(
                f"{len(row.ids)} tokens with {len(images)} images; this model takes at most {most}; give fewer or "
                "smaller images, or less text"
            )
        return row

    def _add_image(self, row: _Row, source: Any, images: int) -> None:
        image = open_image(source, ratio=self.tile)
        tile = (self.tile, self.tile)
        canvas = best_resolution(image.size, self.candidate_resolutions) if images <= TILED_IMAGES else tile
        crop = (canvas[0] // self.tile, canvas[1] // self.tile)
        row.tiles.append(tiles_of(image, canvas, self.tile, self.image_mean, self.image_std))
        row.crops.append(crop)
        row.add([self.image_token_id] * image_token_count(crop, self.side))

    def collate(
        self,
        rows: Sequence[_Row],
        *,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        answers: bool = False,
    ) -> BatchFeature:
        """Sequences as one batch, filled up on the left.

        Where any has images: ``images`` float32 (sequences, tiles, 3, side, side), ``images_spatial_crop`` int64
        (sequences, images, 2) with the (width, height) tiles of each image, both filled up with zeros, and
        ``images_seq_mask`` bool (sequences, length), true at image tokens.
        """
        if return_tensors not in ("pt", None):
            raise InputError(f"return_tensors {return_tensors!r}; expected 'pt'")
        length = max(len(row.ids) for row in rows)
        if not padding and any(len(row.ids) < length for row in rows):
            raise InputError("texts of different lengths without padding; expected padding=True")
        ids = torch.full((len(rows), length), int(self.tokenizer.pad_token_id), dtype=torch.int64)
        mask, answer = torch.zeros_like(ids), torch.zeros_like(ids)
        for number, row in enumerate(rows):
            start = length - len(row.ids)
            ids[number, start:] = torch.tensor(row.ids)
            mask[number, start:] = 1
            answer[number, start:] = torch.tensor(row.answer)
        made = {"input_ids": ids, "attention_mask": mask}
        if answers:
            made["assistant_masks"] = answer
        if any(row.tiles for row in rows):
            parts = [np.concatenate(row.tiles) if row.tiles else np.empty((0,)) for row in rows]
            tiles = torch.zeros(len(rows), max(map(len, parts)), 3, self.tile, self.tile)
            crops = torch.zeros(len(rows), max(len(row.crops) for row in rows), 2, dtype=torch.int64)
            for number, (row, part) in enumerate(zip(rows, parts, strict=True)):
                if row.crops:
                    tiles[number, : len(part)] = torch.from_numpy(part)
                    crops[number, : len(row.crops)] = torch.tensor(row.crops)
            made |= {"images": tiles, "images_spatial_crop": crops, "images_seq_mask": ids == self.image_token_id}
        return BatchFeature(made)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that the model takes."""
        return ["input_ids", "attention_mask", "images", "images_spatial_crop", "images_seq_mask"]


def _nested(images: Any, texts: int) -> list[list[Any]]:
    """One list of images for each text."""
    if images is None:
        return [[] for _ in range(texts)]
    if not isinstance(images, (list, tuple)):
        images = [images]
    if texts == 1 and not any(isinstance(image, (list, tuple)) for image in images):
        return [list(images)]
    if len(images) != texts or not all(isinstance(own, (list, tuple)) for own in images):
        raise InputError(f"{len(images)} images for {texts} texts; expected one list of images for each text")
    return [list(own) for own in images]


def _complete(tokenizer: Any, image_token: str, pad_token: str, vocab_size: int | None) -> None:
    """Give the tokenizer the special tokens that it lacks: they come after its own, in this order."""
    for name in ("bos_token", "eos_token"):
        if getattr(tokenizer, name) is None:
            raise ModelError(f"the tokenizer has no {name}; expected DeepSeek-VL2's; add it to tokenizer_config.json")
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": pad_token})
    wanted = (image_token, *GROUNDING_TOKENS, *CHAT_TOKENS)
    known = tokenizer.get_vocab()
    missing = [token for token in wanted if token not in known]
    tokenizer.add_tokens(missing, special_tokens=True)
    largest = max(int(tokenizer.convert_tokens_to_ids(token)) for token in wanted)
    if vocab_size is not None and largest >= vocab_size:
        raise ModelError(
            f"the tokenizer has {len(known)} tokens and lacks {', '.join(missing) or 'none'} of DeepSeek-VL2's, the last "
            f"of which would be token {largest} of a model with {vocab_size}; give the model's own tokenizer files"
        )
