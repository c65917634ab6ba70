"""The evaluation of a tiny model and its file."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mopeq.errors import DataError, MapError
from mopeq.evaluate import Evaluation, evaluate
from mopeq.stats import read_json, write_json

TEXT = "the quick brown fox jumps over the lazy dog; " * 12


@pytest.fixture(scope="module")
def models(tiny_model: Callable[..., Path]) -> tuple[Any, Any, Any]:
    folder = tiny_model("olmoe")
    original = AutoModelForCausalLM.from_pretrained(folder).eval()
    changed = copy.deepcopy(original)
    with torch.no_grad():
        for name, p in changed.named_parameters():
            if ".experts." in name:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * p.std())
    return original, changed, AutoTokenizer.from_pretrained(folder)


def test_everything_at_once_survives_its_file(models: tuple[Any, Any, Any], tmp_path: Path) -> None:
    original, changed, tokenizer = models
    found = evaluate(changed, tokenizer, reference=original, text=TEXT, length=64, batch_size=4, speed=True)
    assert found.divergence is not None
    assert found.perplexity is not None
    assert found.reference_perplexity is not None
    assert 0 < found.divergence.kl.value < 1
    assert 0.5 < found.divergence.agreement.value <= 1
    assert found.perplexity.bytes == len(TEXT) - 1
    assert found.info["windows"] == len(found.perplexity.window_nats) == 9
    assert found.resident_bytes == found.reference_resident_bytes
    write_json(tmp_path / "evaluation.json", found.to_json())
    assert Evaluation.from_json(read_json(tmp_path / "evaluation.json")) == found


def test_batches_of_a_real_model_change_little(models: tuple[Any, Any, Any]) -> None:
    original, changed, tokenizer = models
    one, four = (
        evaluate(changed, tokenizer, reference=original, text=TEXT, length=64, batch_size=n).divergence for n in (1, 4)
    )
    assert one is not None
    assert four is not None
    assert one.window_kl == pytest.approx(four.window_kl, rel=1e-3)


def test_without_a_reference_there_is_no_divergence(models: tuple[Any, Any, Any]) -> None:
    original, _, tokenizer = models
    found = evaluate(original, tokenizer, text=TEXT, length=64, limit=2)
    assert found.divergence is found.reference_perplexity is None
    assert found.perplexity is not None
    assert found.perplexity.tokens == 2 * 63
    assert evaluate(original, tokenizer).perplexity is None


def test_missing_text_is_named(models: tuple[Any, Any, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file .*none.txt"):
        evaluate(models[0], models[2], text=tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "not an evaluation"),
        ({"version": 2}, "evaluation version 2; this mopeq reads version 1"),
        ({"resident_bytes": None}, "malformed evaluation"),
        ({"perplexity": {}}, "malformed evaluation"),
    ],
)
def test_a_bad_file_is_refused(change: dict[str, Any], message: str) -> None:
    data = json.loads(json.dumps(Evaluation(resident_bytes=1).to_json()))
    assert Evaluation.from_json(data) == Evaluation(resident_bytes=1)
    with pytest.raises(MapError, match=message):
        Evaluation.from_json({**data, **change})
