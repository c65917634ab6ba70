"""Conversations with images: what a file may say, and what batches know of tokens and answers."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from mopeq.data.conversations import (
    conversation_batches,
    has_images,
    question_batches,
    read_conversations,
    read_questions,
)
from mopeq.errors import DataError

FOLDER = Path(__file__).parent.parent / "fixtures" / "processors"


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(FOLDER / "deepseek_vl2")


def picture(colour: str = "red", size: tuple[int, int] = (60, 60)) -> str:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def written(tmp_path: Path, *records: Any) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return path


def said(content: Any, answer: str = "Red.") -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def test_strings_and_parts_say_the_same(tmp_path: Path, processor: Any) -> None:
    (tmp_path / "a.png").write_bytes(base64.b64decode(picture()))
    part = {"type": "image", "path": "a.png"}
    path = written(
        tmp_path,
        {"messages": said("<image>\nWhich colour?"), "images": ["a.png"]},
        {"messages": said("<image>Which colour?"), "images": ["data:image/png;base64," + picture()]},
        {"messages": said([part, {"type": "text", "text": "Which colour?"}])},
        {"messages": said([{"type": "image"}, {"type": "text", "text": "Which colour?"}]), "images": ["a.png"]},
    )
    assert has_images(path)
    found = [
        processor.apply_chat_template(messages, tokenize=True, return_dict=True)
        for messages in read_conversations(path)
    ]
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


def test_batches_know_image_tokens_and_answers(tmp_path: Path, processor: Any) -> None:
    image = "data:image/png;base64," + picture()
    wide = "data:image/png;base64," + picture("blue", (150, 60))
    path = written(
        tmp_path,
        {"messages": said("<image>\nWhich colour?"), "images": [image]},
        {"messages": said("Hello!", "Hi.")},
        {"messages": said("<image>\nWhich colour?", "Blue."), "images": [wide]},
    )
    conversations = read_conversations(path)
    batches = conversation_batches(conversations, processor, samples=9, batch_size=2, seed=0)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 1]
    words = []
    for batch in batches:
        ids = batch["input_ids"]
        assert torch.equal(batch["modality"].bool(), ids == processor.image_token_ids[0])
        answered = batch["labels"] != -100
        assert torch.equal(batch["labels"][answered], ids[answered])
        words += [processor.decode(row[keep]) for row, keep in zip(ids, answered, strict=True)]
    end = processor.tokenizer.eos_token
    assert sorted(words) == [f"Blue.{end}", f"Hi.{end}", f"Red.{end}"]
    few = conversation_batches(conversations, processor, samples=2, batch_size=1, seed=3)
    again = conversation_batches(conversations, processor, samples=2, batch_size=1, seed=3)
    assert len(few) == 2
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(few, again, strict=True))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("{", "line 2 is not JSON"),
        ("7", "line 2 is 7"),
        ({"text": "a"}, "line 2 is no conversation"),
        ({"messages": [{"role": "user"}]}, "line 2 is no conversation"),
        ({"messages": [7]}, "line 2 is no conversation"),
        ({"messages": said("What?"), "images": ["a.png"]}, "line 2: 1 images more than places"),
        ({"messages": said("<image> What?")}, "line 2: more places for images than images"),
        ({"messages": said("<image> What?"), "images": ["gone.png"]}, "line 2: no file"),
        ({"messages": said("<image> What?"), "images": ["data:image/png;base64,aGVsbG8="]}, "no image that Pillow"),
    ],
)
def test_bad_lines(record: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        read_conversations(written(tmp_path, {"messages": said("Hello!")}, record))


def test_files_without_conversations(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no conversations"):
        read_conversations(written(tmp_path))
    assert not has_images(written(tmp_path))
    assert not has_images(written(tmp_path, {"text": "a"}, {"messages": said("<image>"), "images": ["a.png"]}))
    assert not has_images(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match="batch_size is 0"):
        conversation_batches([said("a")], None, samples=1, batch_size=0, seed=0)


def test_question_tables(tmp_path: Path, processor: Any) -> None:
    path = tmp_path / "table.tsv"
    head = "index\timage\tquestion\tanswer\tcategory\n"
    path.write_text(head + f'0\t{picture()}\t"Which\ncolour?"\tred\tcolour\n1\t0\tIs it red?\tyes\texists\n')
    questions = read_questions(path)
    assert [q.text for q in questions] == ["Which\ncolour?", "Is it red?"]
    assert questions[1].images == questions[0].images == (picture(),)
    (batch,) = question_batches(questions, processor, 8)
    ends = [processor.decode(row[row != -100]) for row in batch["labels"]]
    assert ends == [f"{q.answer}{processor.tokenizer.eos_token}" for q in questions]
    path.write_text("index\tquestion\n0\ta\n")
    with pytest.raises(DataError, match="has no answer, image"):
        read_questions(path)
    path.write_text(head + f"0\t{'%' * 80}\tWhat?\tred\tcolour\n")
    with pytest.raises(DataError, match="the image of question 0"):
        question_batches(read_questions(path), processor, 8)
