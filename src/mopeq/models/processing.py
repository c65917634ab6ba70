"""What the processors of DeepSeek-VL2 and MolmoE do alike: texts, conversations, answers and padding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from mopeq.errors import DataError, InputError
from mopeq.models.conversation import Turn, conversations, images_of, turns_of

__all__ = ["Row", "VisionProcessor"]


@dataclass
class Row:
    """One sequence: its token ids, which of them are answers, and what a model's processor notes of its images."""

    ids: list[int] = field(default_factory=list)
    answer: list[bool] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)

    def add(self, ids: Sequence[int], answer: bool = False) -> None:
        """Append tokens."""
        self.ids += ids
        self.answer += [answer] * len(ids)


class VisionProcessor(ProcessorMixin, ABC):
    """Texts or conversations with images to batches; subclasses lay out one sequence and put images together."""

    image_token: str
    image_token_ids: list[int | None]
    """Ids of all tokens that an image becomes."""
    tensors: ClassVar[tuple[str, ...]] = ()
    """Names of the image tensors."""

    @abstractmethod
    def _pieces(self, turns: Sequence[Turn]) -> list[tuple[str, bool]]:
        """Texts that are tokenized each on its own, and whether they are answers, which an end token follows."""

    @abstractmethod
    def _row(self, pieces: Sequence[tuple[str, bool]], images: Sequence[Any]) -> Row:
        """One sequence, begin token first, with its images."""

    @abstractmethod
    def _image_tensors(self, rows: Sequence[Row], ids: Tensor) -> dict[str, Tensor]:
        """The tensors that images become; ``ids`` (sequences, length) are filled up on the left."""

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
        """Raw text after the begin token, with an image token for each image.

        Args:
            images: what :func:`mopeq.models.images.open_image` takes: one, a list of them, or one list for each text.
            text: one or several.
            videos: refused.
            return_tensors: only ``pt``.
            padding: of several texts, on the left; False refuses texts of different lengths.
            options: of transformers' callers; not used.

        Returns:
            ``input_ids`` and ``attention_mask`` int64 (texts, length), and the image tensors where there are images.

        Raises:
            DataError: images that cannot be used, or as many as there are not image tokens.
            InputError: videos, no text, or lists that do not fit.
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
            rows.append(self._checked([(words.removeprefix(begin), False)], own))
        return self._collate(rows, return_tensors, padding, answers=False)

    def apply_chat_template(  # type: ignore[override]  # images are in the messages, answers have a mask
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        tools: Any = None,
        documents: Any = None,
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

        A user's turn always ends with the assistant's header, as these models know it, so that
        ``add_generation_prompt`` changes nothing. What messages look like: :func:`mopeq.models.conversation.turns_of`.

        Returns:
            The text, or with ``tokenize`` token ids, or with ``return_dict`` what calling gives and, if asked for,
            ``assistant_masks`` int64 (conversations, length), 1 at answers and their end tokens.
        """
        if chat_template is not None or tools or documents:
            raise InputError("a chat template, tools or documents; this model knows none; leave them out")
        batch = [self._pieces_and_images(messages) for messages in conversations(conversation)]
        if not tokenize:
            texts = [self._text(pieces) for pieces, _ in batch]
            return texts[0] if isinstance(conversation[0], Mapping) else texts
        rows = [self._checked(pieces, images) for pieces, images in batch]
        made = self._collate(rows, return_tensors, padding, answers=return_assistant_tokens_mask)
        return made if return_dict else made["input_ids"]

    def _pieces_and_images(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[str, bool]], list[Any]]:
        turns = turns_of(messages, self.image_token)
        return self._pieces(turns), images_of(turns)

    def _text(self, pieces: Sequence[tuple[str, bool]]) -> str:
        end = str(self.tokenizer.eos_token)
        return str(self.tokenizer.bos_token) + "".join(words + end * answer for words, answer in pieces)

    def _checked(self, pieces: Sequence[tuple[str, bool]], images: Sequence[Any]) -> Row:
        row = self._row(pieces, images)
        most = int(self.tokenizer.model_max_length)
        if len(row.ids) > most:
            raise DataError(
                f"{len(row.ids)} tokens with {len(images)} images; expected at most {most} for this model; give fewer "
                "or smaller images, or less text"
            )
        return row

    def _collate(
        self, rows: Sequence[Row], return_tensors: str | None, padding: bool | str, *, answers: bool
    ) -> BatchFeature:
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
        if any(row.images for row in rows):
            made |= self._image_tensors(rows, ids)
        return BatchFeature(made)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that the model takes."""
        return ["input_ids", "attention_mask", *self.tensors]


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
