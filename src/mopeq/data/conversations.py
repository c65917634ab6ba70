"""Conversations with images: from JSONL to calibration batches that know image tokens and answers, and VQA tables.

A line of JSONL is ``{"messages": [{"role": ..., "content": ...}, ...], "images": [...]}``: contents are strings with
``<image>`` where an image belongs, taken from ``images`` in order, or lists of parts as transformers has them. An image
is a path, from the file's folder on, or a ``data:`` address.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopeq.data.text import read_text
from mopeq.errors import DataError
from mopeq.models.images import open_image

__all__ = [
    "IMAGE",
    "Conversation",
    "Question",
    "conversation_batches",
    "has_images",
    "question_batches",
    "read_conversations",
    "read_questions",
]

IMAGE = "<image>"
"""Where an image belongs in a string, whatever the model's own token is."""
Conversation = Sequence[Mapping[str, Any]]
"""Messages whose contents are strings or lists of parts, images opened."""
COLUMNS = ("index", "image", "question", "answer")


@dataclass(frozen=True)
class Question:
    """One question of a VQA table: an image in base64, what is asked about it, the answer and its kind."""

    index: str
    image: str
    text: str
    answer: str
    category: str = ""


def has_images(path: str | Path) -> bool:
    """Whether a file is JSONL whose first line has images."""
    path = Path(path)
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    _, first = next(_records(path), (0, {}))
    contents = [m.get("content") for m in first.get("messages") or () if isinstance(m, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return bool(first.get("images")) or any(isinstance(p, Mapping) and p.get("type") == "image" for p in parts)


def read_conversations(path: str | Path) -> list[Conversation]:
    """The conversations of a JSONL file, every image opened.

    Raises :class:`DataError`, with the line, for what is no conversation, images that cannot be used, and as many
    images as there are not places for them.
    """
    path = Path(path)
    made = []
    for number, record in _records(path):
        try:
            made.append(_conversation(record, path.parent))
        except DataError as error:
            raise DataError(f"{path} line {number}: {error}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f'{path} line {number} is no conversation ({error}); expected "messages" with "role" and "content"; '
                "fix or remove the line"
            ) from error
    if not made:
        raise DataError(f"{path} has no conversations; expected one a line; give another file")
    return made


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path} line {number} is not JSON ({error}); fix or remove the line") from error
        if not isinstance(record, dict):
            raise DataError(f'{path} line {number} is {record!r:.60}; expected an object with "messages"; fix the line')
        yield number, record


def _conversation(record: Mapping[str, Any], folder: Path) -> Conversation:
    waiting = [_source(image, folder) for image in record.get("images") or ()]
    messages = []
    for message in record["messages"]:
        content = message["content"]
        parts = _split(content) if isinstance(content, str) else [dict(part) for part in content]
        for part in parts:
            if part["type"] == "image":
                own = next((part.pop(key) for key in ("image", "path", "url") if part.get(key)), None)
                if own is None and not waiting:
                    raise DataError('more places for images than images; expected as many; add to "images"')
                part["image"] = open_image(waiting.pop(0) if own is None else _source(own, folder))
        messages.append({"role": message["role"], "content": parts})
    if waiting:
        raise DataError(f"{len(waiting)} images more than places for them; expected as many; write {IMAGE} for each")
    return messages


def _split(content: str) -> list[dict[str, Any]]:
    """A string to parts. A line break after an image is the model's to write."""
    parts: list[dict[str, Any]] = []
    for number, words in enumerate(content.split(IMAGE)):
        if number:
            parts.append({"type": "image"})
        words = words.removeprefix("\n") if number else words
        if words:
            parts.append({"type": "text", "text": words})
    return parts


def _source(image: Any, folder: Path) -> Any:
    if isinstance(image, str) and not image.startswith(("data:", "http://", "https://")):
        return folder / image
    return image


def conversation_batches(
    conversations: Sequence[Conversation], processor: Any, *, samples: int, batch_size: int, seed: int
) -> list[dict[str, Tensor]]:
    """Batches for calibration: ``samples`` conversations in random order, each whole.

    Besides what the model takes: ``modality`` int64 (sequences, length), 1 at image tokens, and, where the processor
    can tell answers, ``labels`` int64 (sequences, length), the answers' tokens, -100 elsewhere. Conversations of about
    the same length share a batch.
    """
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if value < 1:
            raise DataError(f"{name} is {value}; expected at least 1")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(conversations), generator=generator)[:samples].tolist()
    single = [_batch(processor, [conversations[i]]) for i in order]
    ranked = sorted(range(len(order)), key=lambda at: single[at]["input_ids"].shape[1])
    parts = [ranked[i : i + batch_size] for i in range(0, len(ranked), batch_size)]
    return [_batch(processor, [conversations[order[at]] for at in part]) for part in parts]


def _batch(processor: Any, conversations: Sequence[Conversation]) -> dict[str, Tensor]:
    made = processor.apply_chat_template(
        list(conversations),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        padding=True,
    )
    batch = {name: value for name, value in made.items() if isinstance(value, Tensor)}
    batch["modality"] = torch.isin(batch["input_ids"], torch.tensor(processor.image_token_ids)).long()
    answers = batch.pop("assistant_masks", None)
    if answers is not None and bool(answers.any()):
        batch["labels"] = torch.where(answers.bool(), batch["input_ids"], -100)
    return batch


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a table in VLMEvalKit's format: tab-separated, with a head line and images in base64.

    A row whose image is the index of another row has that row's image.
    """
    path = Path(path)
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # an image is one field
    rows = list(csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t"))
    missing = [name for name in COLUMNS if not rows or rows[0].get(name) is None]
    if missing:
        raise DataError(f"{path} has no {', '.join(missing)}; expected columns {', '.join(COLUMNS)} and a row or more")
    images = {row["index"]: row["image"] for row in rows}
    return [
        Question(
            row["index"],
            images.get(row["image"], row["image"]),
            row["question"],
            row["answer"],
            row.get("category") or "",
        )
        for row in rows
    ]


def question_batches(questions: Sequence[Question], processor: Any, batch_size: int) -> list[dict[str, Tensor]]:
    """Questions with their answers, in order, as :func:`conversation_batches` makes batches."""
    asked: list[Conversation] = []
    for question in questions:
        image = open_image(f"data:image/png;base64,{question.image}", f"the image of question {question.index}")
        parts = [{"type": "image", "image": image}, {"type": "text", "text": question.text}]
        answer = {"role": "assistant", "content": [{"type": "text", "text": question.answer}]}
        asked.append([{"role": "user", "content": parts}, answer])
    return [_batch(processor, asked[i : i + batch_size]) for i in range(0, len(asked), batch_size)]
