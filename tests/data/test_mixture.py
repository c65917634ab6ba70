"""Sources of calibration text: mixes, tables, the hub, the model itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet

from mopeq.data.mixture import read_data, written
from mopeq.data.text import token_batches
from mopeq.errors import DataError
from mopeq.load import load_original, load_tokenizer
from mopeq.measure import Calibration, split_texts

Make = Callable[..., Path]


def documents(path: Path, letter: str, count: int, length: int = 100) -> Path:
    path.write_text("\n".join(json.dumps({"text": letter * length}) for _ in range(count)))
    return path


def share(texts: list[str], letter: str) -> float:
    return sum(map(len, (t for t in texts if letter in t))) / sum(map(len, texts))


def test_a_mix_has_its_shares(tmp_path: Path) -> None:
    a, b, c = (documents(tmp_path / f"{n}.jsonl", n, count) for n, count in (("a", 40), ("b", 100), ("c", 30)))
    texts = read_data(f"{a}:2, {b}:1,{c}:0.5")
    assert sum(map(len, texts)) == 7000, "a is the scarcest for its weight: 4000 of 2, so 2000 and 1000"
    assert [share(texts, n) for n in "abc"] == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert [share(read_data(f"{a},{c}"), n) for n in "ac"] == pytest.approx([0.5, 0.5])
    assert read_data(str(a)) == ["a" * 100] * 40


def test_a_share_is_spread_over_its_documents_and_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{i:010}"}) for i in range(100)))
    b = documents(tmp_path / "b.jsonl", "b", 1, 195)
    texts = [t for t in read_data(f"{path},{b}") if "b" not in t]
    assert sum(map(len, texts)) == 195
    assert len(texts[-1]) == 5
    numbers = sorted(map(int, texts[:-1]))
    assert len(set(numbers)) == 19
    assert numbers[0] < 20
    assert numbers[-1] >= 80


def test_a_path_is_a_source_whatever_it_is_called(tmp_path: Path) -> None:
    odd = documents(tmp_path / "a,b:2", "x", 1)
    assert read_data(str(odd)) == [odd.read_text()]


def test_parquet_files_and_folders(tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]]
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": ["one", "", "two"]}), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"messages": chats}), tmp_path / "b.parquet")
    assert read_data(str(tmp_path / "a.parquet")) == ["one", "two"]
    assert read_data(str(tmp_path)) == ["one", "two", "hi\n\nyo"]


def test_datasets_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    folder = tmp_path / "en"
    folder.mkdir()
    parquet.write_table(pyarrow.table({"text": ["one"]}), folder / "train.parquet")

    def downloaded(name: str, **options: Any) -> str:
        asked.append((name, options["repo_type"], options["allow_patterns"][0]))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", downloaded)
    assert read_data("hf:owner/name/en") == ["one"]
    assert asked == [("owner/name", "dataset", "en*.parquet")]


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    a = documents(tmp_path / "a.jsonl", "a", 2)
    parquet.write_table(pyarrow.table({"id": [1]}), tmp_path / "b.parquet")
    parquet.write_table(pyarrow.table({"messages": [["no"]]}), tmp_path / "c.parquet")
    (tmp_path / "d.parquet").write_text("no")
    for data, said in (
        (f"{a}:0,{a}", "has weight 0; expected more than 0"),
        (",", "names no source"),
        (f"{a},missing.txt", "no file missing.txt"),
        ("hf:owner/name", "cannot be had from the hub"),
        (str(tmp_path / "b.parquet"), "has columns id; expected one of text"),
        (str(tmp_path / "c.parquet"), "neither a string nor messages"),
        (str(tmp_path / "d.parquet"), "cannot be read as parquet"),
    ):
        with pytest.raises(DataError, match=said):
            read_data(data)


def test_a_model_writes_what_it_would(tiny_model: Make) -> None:
    """Tokens are drawn from the model's own chances, each after those before it."""
    model, tokenizer = load_original(tiny_model("olmoe")), load_tokenizer(tiny_model("olmoe"))
    options: dict[str, Any] = {"samples": 6, "length": 12, "batch_size": 4}
    texts = written(model, tokenizer, **options, seed=1)
    assert texts == written(model, tokenizer, **options, seed=1)
    assert texts != written(model, tokenizer, **options, seed=2)
    assert len(texts) == 6
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((4, 1), tokenizer.bos_token_id)
    for _ in range(12):  # without a cache
        with torch.no_grad():
            chances = model(input_ids=ids, use_cache=False).logits[:, -1].float().softmax(-1)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
    assert texts[:4] == tokenizer.batch_decode(ids[:, 1:], skip_special_tokens=True)


def test_self_written_text_calibrates_and_is_kept_apart(tiny_model: Make) -> None:
    folder = tiny_model("olmoe")
    training, heldout = split_texts(Calibration("self", samples=6, length=32), folder)
    assert (len(training), len(heldout)) == (6, 48)
    assert not set(training) & set(heldout)
    batches = token_batches(training, load_tokenizer(folder), samples=3, length=32, batch_size=3, seed=0)
    assert batches[0]["input_ids"].shape == (3, 32)
