"""Perplexity against the textbook."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from scripted import Scripted, scripted, textbook
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mopeq.data.text import sliding_windows, text_windows
from mopeq.errors import ModelError
from mopeq.evaluate import Perplexity, perplexity
from mopeq.evaluate.perplexity import batched, score_windows, summarize, text_bytes


def letters() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "d": 3, "é": 4, "[EOS]": 5, "?": 6}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="[EOS]", unk_token="?")


@pytest.mark.parametrize(("stride", "batch_size"), [(None, 1), (None, 3), (4, 2)])
def test_agrees_with_float64(stride: int | None, batch_size: int) -> None:
    model = scripted(0)
    ids = torch.randint(7, (50,), generator=torch.Generator().manual_seed(1))
    windows = sliding_windows(ids, 12, stride)
    found = score_windows(model, windows, batch_size=batch_size)
    for nats, window in zip(found, windows, strict=True):
        scores = textbook(model, window.ids, window.scored)
        wanted = -scores[np.arange(window.scored), window.ids[-window.scored :].numpy()].sum()
        assert nats == pytest.approx(wanted, rel=2e-6)
    record = summarize(found, windows, None)
    assert record.tokens == 49
    assert record.nats.value == pytest.approx(sum(found) / 49, rel=1e-12)
    assert record.perplexity.value == pytest.approx(math.exp(record.nats.value), rel=1e-12)


def test_chunks_of_positions_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = scripted(0), sliding_windows(torch.arange(30) % 7, 12)
    whole = score_windows(model, windows)
    monkeypatch.setattr(sys.modules["mopeq.evaluate.perplexity"], "CHUNK_VALUES", 15)
    assert score_windows(model, windows) == pytest.approx(whole, rel=1e-6)


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    found = perplexity(Scripted(torch.zeros(12, 7, 7)), letters(), "abcdabcdabcdabcd", length=6)
    assert found.perplexity.value == pytest.approx(7.0, rel=1e-6)
    assert found.perplexity.low == pytest.approx(7.0, rel=1e-6)


def test_bits_per_byte_counts_the_scored_text() -> None:
    tokenizer = letters()
    windows = text_windows(["abé", "cd"], tokenizer, 12)
    assert windows[0].ids.tolist() == [0, 1, 4, 5, 2, 3]
    assert text_bytes(windows, tokenizer) == len("bécd".encode())
    found = perplexity(Scripted(torch.zeros(12, 7, 7)), tokenizer, ["abé", "cd"], length=12)
    assert found.bytes == 5
    assert found.bits_per_byte == pytest.approx(5 * math.log2(7) / 5, rel=1e-6)


def test_batches_hold_windows_alike() -> None:
    windows = sliding_windows(torch.arange(50) % 7, 12)
    assert [len(w.ids) for w in windows] == [12, 12, 12, 12, 6]
    assert batched(windows, 3) == [[0, 1, 2], [3], [4]]
    assert batched(sliding_windows(torch.arange(30) % 7, 12, 4), 9) == [[0], [1, 2, 3, 4], [5]]


def test_logits_that_are_not_finite_are_an_error() -> None:
    model = scripted(0)
    with torch.no_grad():
        model.table[3] = math.nan
    with pytest.raises(ModelError, match="no finite likelihood in window 0; expected finite logits"):
        perplexity(model, letters(), "abcdabcdabcdabcd", length=6)


def test_json_round_trip() -> None:
    found = perplexity(scripted(0), letters(), "abcdabcdabcdabcd", length=6)
    assert Perplexity.from_json(json.loads(json.dumps(asdict(found)))) == found
