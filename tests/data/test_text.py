"""Reading text, calibration batches, windows to score."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mopeq.data.text import (
    Window,
    fingerprint,
    read_texts,
    sliding_windows,
    text_windows,
    token_batches,
    token_stream,
    window_batches,
)
from mopeq.errors import DataError


class Letters:
    """A tokenizer of one token a character."""

    eos_token_id: int | None = 0
    pad_token_id: int | None = None

    def __init__(self, bos: bool = False) -> None:
        self.bos = bos

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1] * self.bos + [ord(c) for c in text]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(i) for i in ids if i > 1)


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), encoding="utf-8")
    return path


def test_reads_text_jsonl_and_folders(tmp_path: Path) -> None:
    assert read_texts(write(tmp_path / "a.txt", "one\ntwo")) == ["one\ntwo"]
    conversation = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [{"type": "text", "text": "yo"}]},
    ]
    lines = ({"text": "first"}, "", {"messages": conversation}, {"text": "  "})
    assert read_texts(write(tmp_path / "b.jsonl", *lines)) == ["first", "hi\n\nyo"]
    assert read_texts(write(tmp_path / "marked.jsonl", "\ufeff" + json.dumps({"text": "first"}))) == ["first"]
    write(tmp_path / "0.txt", "zero")
    assert read_texts(tmp_path) == ["zero", "one\ntwo"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "no file .*none.txt; expected a .txt or .jsonl file"),
        ("a.txt", " \n", "has no text; expected at least one document"),
        ("a.jsonl", "", "has no text"),
        ("a.jsonl", '{"text": "x"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", '\n{"txt": "x"}', 'line 2 is an object with txt; expected one object with "text" or "messages"'),
        ("a.jsonl", "[1]", r"line 1 is \[1\]"),
        ("a.jsonl", '{"text": 3}', "line 1 has text that is not a string"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user"}]}',
            "line 1 has text that is not a string, or messages without content",
        ),
        ("a.json", "[]", "is a .json file; expected .txt, or .jsonl"),
        ("a.txt", b"\xff\xfe", "is not UTF-8 text"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str | bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_texts(tmp_path / name)


def test_a_folder_without_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no .txt files"):
        read_texts(tmp_path)


def test_documents_are_joined_with_end_of_text() -> None:
    assert token_stream(["ab", "c"], Letters()).tolist() == [97, 98, 0, 99]
    assert token_stream(["ab", "c"], Letters(bos=True)).tolist() == [1, 97, 98, 0, 1, 99]
    without = Letters()
    without.eos_token_id = None
    assert token_stream(["ab", "c"], without).tolist() == [97, 98, 99]


def rows(batches: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    return [row.tolist() for batch in batches for row in batch["input_ids"]]


def test_batches_are_seeded_windows_that_do_not_overlap() -> None:
    texts = ["".join(map(chr, range(2, 100)))]
    batches = token_batches(texts, Letters(), samples=7, length=9, batch_size=3, seed=1)
    assert [tuple(b["input_ids"].shape) for b in batches] == [(3, 9), (3, 9), (1, 9)]
    assert all(b["input_ids"].dtype == b["attention_mask"].dtype == torch.int64 for b in batches)
    assert all(bool(b["attention_mask"].all()) for b in batches)
    found = rows(batches)
    assert all(b - a == 1 for row in found for a, b in pairwise(row))
    assert len({token for row in found for token in row}) == 63
    again = token_batches(texts, Letters(), samples=7, length=9, batch_size=3, seed=1)
    other = token_batches(texts, Letters(), samples=7, length=9, batch_size=3, seed=2)
    assert rows(again) == found != rows(other)


def test_a_short_text_is_taken_whole_and_padded_on_the_right() -> None:
    batches = token_batches(["abcdefgh"], Letters(), samples=9, length=5, batch_size=9, seed=0)
    (batch,) = batches
    short = batch["attention_mask"].sum(1).argmin()
    assert sorted(map(tuple, rows(batches))) == [(97, 98, 99, 100, 101), (102, 103, 104, 0, 0)]
    assert batch["attention_mask"][short].tolist() == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("name", ["samples", "length", "batch_size"])
def test_numbers_must_be_positive(name: str) -> None:
    numbers = {"samples": 1, "length": 2, "batch_size": 1, name: 0}
    with pytest.raises(DataError, match=f"{name} is 0; expected at least"):
        token_batches(["abc"], Letters(), seed=0, **numbers)


def test_too_little_text_for_one_window() -> None:
    with pytest.raises(
        DataError, match="the text has 3 tokens, fewer than one window of 4; give more text or a shorter"
    ):
        token_batches(["abc"], Letters(), samples=1, length=4, batch_size=1, seed=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.integers(2, 20), st.data())
def test_windows_score_every_token_but_the_first_once(tokens: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.one_of(st.none(), st.integers(1, length - 1)))
    windows = sliding_windows(torch.arange(tokens), length, stride)
    scored = [int(t) for w in windows for t in w.ids[len(w.ids) - w.scored :]]
    assert scored == list(range(1, tokens))
    assert all(0 < w.scored < len(w.ids) <= length for w in windows)
    if stride is not None:
        assert all(len(w.ids) - w.scored >= min(length - stride, int(w.ids[-w.scored])) for w in windows)


@pytest.mark.parametrize(("length", "stride"), [(1, None), (4, 0), (4, 4)])
def test_windows_need_context(length: int, stride: int | None) -> None:
    with pytest.raises(DataError, match="expected length 2 or more, stride 1 to length - 1"):
        sliding_windows(torch.arange(9), length, stride)


def test_one_token_cannot_be_scored() -> None:
    with pytest.raises(DataError, match="the text has 1 tokens; expected at least 2"):
        sliding_windows(torch.arange(1), 4)


def test_text_windows_reads_paths_strings_and_documents(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "abcd"}, {"text": "efgh"})
    joined = fingerprint(text_windows(path, Letters(), 4))
    assert joined == fingerprint(text_windows(["abcd", "efgh"], Letters(), 4))
    assert joined != fingerprint(text_windows("abcdefgh", Letters(), 4))
    assert joined != fingerprint(text_windows(path, Letters(), 4, stride=2))


def test_a_limit_spreads_windows_over_the_text() -> None:
    windows = text_windows("".join(map(chr, range(2, 103))), Letters(), 11, limit=3)
    assert [int(w.ids[0]) for w in windows] == [2, 32, 62]
    with pytest.raises(DataError, match="0 windows asked for"):
        text_windows("abcdef", Letters(), 3, limit=0)


def test_fingerprint_sees_tokens_and_what_is_scored() -> None:
    ids = torch.arange(5)
    prints = {fingerprint([w]) for w in (Window(ids, 4), Window(ids, 3), Window(ids + 1, 4))}
    assert len(prints) == 3


def test_windows_become_batches_in_their_order() -> None:
    windows = sliding_windows(torch.arange(1, 12), 5)
    batches = window_batches(windows, 2)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 5), (1, 3)]
    rows = [ids[mask.bool()] for batch in batches for ids, mask in zip(*batch.values(), strict=True)]
    assert all(torch.equal(row, w.ids) for row, w in zip(rows, windows, strict=True))
    (padded,) = window_batches(windows, 3)
    assert padded["attention_mask"].sum(1).tolist() == [5, 5, 3]
