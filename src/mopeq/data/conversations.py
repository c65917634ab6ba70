"""Conversations with images: from JSONL to calibration batches that know image tokens and answers, and VQA tables.

A line of JSONL is ``{"messages": [{"role": ..., "content": ...}, ...], "images": [...]}``: contents are strings with
``<image>`` where an image belongs, taken from ``images`` in order, or lists of parts as transformers has them. An image
is a path, from the file's folder on, or a ``data:`` address.
"""

from __future__ import annotations

import ast
import csv
import io
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import torch
from torch import Tensor

from mopeq.data.text import json_lines, read_text
from mopeq.errors import DataError
from mopeq.models.images import open_image

__all__ = [
    "IMAGE",
    "Conversation",
    "Question",
    "asking",
    "conversation_batches",
    "has_images",
    "listed",
    "question_batches",
    "read_conversations",
    "read_questions",
    "token_weights",
]

IMAGE = "<image>"
"""Where an image belongs in a string, whatever the model's own token is."""
Conversation = Sequence[Mapping[str, Any]]
"""Messages whose contents are strings or lists of parts, images opened."""
COLUMNS = ("index", "question", "answer")
REFERENCE = 64
"""Most characters of an image field that is the index of another row, as VLMEvalKit has it."""


@dataclass(frozen=True)
class Question:
    """One question of a VQA table.

    images: in base64, or paths. options: the text of each by its letter. more: the row's other fields that are not
    empty, such as ``hint``, ``image_path``, ``g_index``.
    """

    index: str
    images: tuple[str | Path, ...]
    text: str
    answer: str
    category: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    more: Mapping[str, str] = field(default_factory=dict)


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
    for number, record in json_lines(path, "fix or remove the line"):
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


def token_weights(batches: Sequence[Mapping[str, Tensor]], text: float) -> list[dict[str, Tensor]]:
    """The batches with ``token_weight`` (sequences, length): ``text`` to 1 between text and image tokens, 1 on average.

    Raises :class:`DataError` for a weight that is not above zero, and where tokens of one kind are missing.
    """
    if not 0 < text < math.inf:
        raise DataError(
            f"modality weight {text}; expected a number above 0: what a text token counts, an image token 1"
        )
    kept = [torch.stack([batch.get("modality", torch.zeros_like(batch["input_ids"])), batch["attention_mask"]])
            for batch in batches]  # fmt: skip
    total = sum(int(mask.sum()) for _, mask in kept)
    images = sum(int((image * mask).sum()) for image, mask in kept)
    if not 0 < images < total:
        raise DataError(
            f"a modality weight weighs text against image tokens, and {images} of the {total} calibration tokens are "
            "image tokens; give conversations with images as data, or leave it out"
        )
    mean = (images + text * (total - images)) / total
    return [{**batch, "token_weight": torch.where(image.bool(), 1 / mean, text / mean)}
            for batch, (image, _) in zip(batches, kept, strict=True)]  # fmt: skip


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a table in VLMEvalKit's format: tab-separated, with a head line.

    ``image`` has an image in base64, a list of them, or the index of the row whose images to take; where it is empty or
    missing, ``image_path`` has a path, or a list of them, from the file's folder on. Columns A to Z are options.

    Raises :class:`DataError` for files that are no such table, an index twice, and rows without an image or an answer.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no file {path}; expected a table of questions (.tsv), as VLMEvalKit has them; check the path")
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # an image is one field
    try:
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t", restkey="", restval=None)
        rows = list(reader)
    except csv.Error as error:
        raise DataError(f"{path} is no tab-separated table ({error}); expected one with a head line") from error
    names = reader.fieldnames or ()
    missing = [name for name in COLUMNS if name not in names]
    if not {"image", "image_path"} & set(names):
        missing.append("image")
    if missing or not rows:
        raise DataError(
            f"{path} has no {', '.join(missing) or 'rows'}; expected a tab-separated table with columns "
            f"{', '.join(COLUMNS)}, image or image_path, and a row or more"
        )
    known: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        if "" in row or None in row.values():
            found = sum(value is not None for value in row.values()) + (len(row[""]) - 1 if "" in row else 0)
            raise DataError(
                f"{path} row {number} has {found} fields; expected {len(names)}; quote tabs and line breaks"
            )
        if row["index"] in known:
            raise DataError(f"{path} has index {row['index']!r} twice; expected each once; number the rows anew")
        known[row["index"]] = row.get("image", "")
    return [_question(row, known, path) for row in rows]


def _question(row: Mapping[str, str], known: Mapping[str, str], path: Path) -> Question:
    """A row; ``known`` are all rows' image fields by index."""
    where = f"question {row['index']} of {path}"
    image = row.get("image", "")
    if image and len(image) <= REFERENCE:
        if len(known.get(image, "")) <= REFERENCE:
            raise DataError(f"{where} has image {image!r}; expected base64, or the index of a row that has an image")
        image = known[image]
    images: list[str | Path] = [*_listed(image)] or [path.parent / name for name in _listed(row.get("image_path", ""))]
    if not images:
        raise DataError(f"{where} has no image; expected one in the column image or image_path; remove the row")
    if not row["answer"].strip():
        raise DataError(f"{where} has no answer, so that it cannot be scored; give a split that has answers")
    options = {name: row[name] for name in ascii_uppercase if row.get(name)}
    more = {name: value for name, value in row.items() if value and name != "image" and len(name) > 1}
    return Question(row["index"], tuple(images), row["question"], row["answer"], row.get("category", ""), options, more)


def _listed(text: str) -> list[str]:
    """The texts of a list in Python's or JSON's spelling, or the text itself, if there is one."""
    return listed(text) or ([text] if text else [])


def listed(text: str) -> list[str] | None:
    """The items of a field that spells a list, as texts; None where it spells none."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return [str(item) for item in found] if isinstance(found, list) else None


def asking(question: Question, text: str) -> list[dict[str, Any]]:
    """The content of a message that asks: the images, then the text, or each where the text says ``<image 2>``.

    Raises :class:`DataError` for images that cannot be used, and for places of images that there are not.
    """
    name = f"the image of question {question.index}"
    images = [
        open_image(f"data:image/png;base64,{one}", name) if isinstance(one, str) else open_image(one, f"{one}, {name}")
        for one in question.images
    ]
    pieces = re.split(r"<image (\d+)>", text)
    if len(pieces) == 1:
        return [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        if number % 2 and not 0 < int(piece) <= len(images):
            raise DataError(f"question {question.index} names image {piece} and has {len(images)}; correct the row")
        if number % 2:
            parts.append({"type": "image", "image": images[int(piece) - 1]})
        elif piece.strip():
            parts.append({"type": "text", "text": piece})
    return parts


def question_batches(questions: Sequence[Question], processor: Any, batch_size: int) -> list[dict[str, Tensor]]:
    """Questions with their answers, in order, as :func:`conversation_batches` makes batches."""
    asked: list[Conversation] = []
    for question in questions:
        answer = {"role": "assistant", "content": [{"type": "text", "text": question.answer}]}
        asked.append([{"role": "user", "content": asking(question, question.text)}, answer])
    return [_batch(processor, asked[i : i + batch_size]) for i in range(0, len(asked), batch_size)]
