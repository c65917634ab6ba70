"""KL and agreement against the textbook."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from scripted import Scripted, scripted, textbook
from torch import nn

from mopeq.data.text import Window, sliding_windows
from mopeq.errors import DataError, ModelError, OutputError
from mopeq.evaluate import Divergence, compare, divergence, evaluate_many, paired_difference
from mopeq.evaluate.perplexity import score_windows


def windows(tokens: int = 60, length: int = 12) -> list[Window]:
    return sliding_windows(torch.randint(7, (tokens,), generator=torch.Generator().manual_seed(5)), length)


def near(model: Scripted, amount: float, seed: int = 9) -> Scripted:
    noise = torch.randn(model.table.shape, generator=torch.Generator().manual_seed(seed))
    return Scripted(model.table.detach() + amount * noise)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_agrees_with_float64(batch_size: int) -> None:
    original = scripted(0)
    model = near(original, 0.5)
    found = divergence(original, model, windows(), batch_size=batch_size)
    total_kl, total_agreed, tokens = 0.0, 0, 0
    for window, kl, agreed in zip(windows(), found.window_kl, found.window_agreed, strict=True):
        p, q = (textbook(m, window.ids, window.scored) for m in (original, model))
        wanted = (np.exp(p) * (p - q)).sum()
        assert kl == pytest.approx(wanted, rel=1e-5)
        assert agreed == (p.argmax(-1) == q.argmax(-1)).sum()
        total_kl, total_agreed, tokens = total_kl + wanted, total_agreed + agreed, tokens + window.scored
    assert found.tokens == tokens == 59
    assert found.kl.value == pytest.approx(total_kl / tokens, rel=1e-5)
    assert found.agreement.value == total_agreed / tokens
    assert 0 < found.agreement.value < 1


def test_a_model_is_at_distance_zero_from_itself() -> None:
    found = compare(scripted(0), scripted(0), windows())
    assert found.divergence.kl.value == 0.0
    assert (found.divergence.kl.low, found.divergence.kl.high) == (0.0, 0.0)
    assert found.divergence.agreement.value == 1.0
    assert found.reference == found.candidate


def test_the_same_pass_gives_the_perplexities() -> None:
    original, model = scripted(0), scripted(1)
    found = compare(original, model, windows())
    assert list(found.reference.window_nats) == score_windows(original, windows())
    assert list(found.candidate.window_nats) == score_windows(model, windows())


def test_small_noise_costs_half_its_fisher_norm() -> None:
    original = scripted(0, scale=1.0)
    model = near(original, 1e-2)
    wanted, tokens = 0.0, 0
    for window in windows():
        p = np.exp(textbook(original, window.ids, window.scored))
        for position, (row, token) in enumerate(zip(p, window.ids[:-1].tolist(), strict=True)):
            change = (model.table - original.table).detach().double().numpy()[position, token]
            wanted += 0.5 * (row @ change**2 - (row @ change) ** 2)
        tokens += window.scored
    assert divergence(original, model, windows()).kl.value == pytest.approx(wanted / tokens, rel=0.03)


def test_tokens_that_are_impossible_in_the_original_add_nothing() -> None:
    original, model = scripted(0), near(scripted(0), 0.1)
    seen = [w.ids for w in windows()]
    free = [Window(torch.where(ids == 6, 0, ids), len(ids) - 1) for ids in seen]
    for m in (original, model):
        with torch.no_grad():
            m.table[..., 6] = -math.inf
    found = divergence(original, model, free)
    assert math.isfinite(found.kl.value)
    assert found.kl.value > 0


def test_many_candidates_with_and_without_a_cache(tmp_path: Path) -> None:
    original = scripted(0).to(torch.bfloat16)
    loads: list[str] = []

    def loader(name: str, model: nn.Module) -> Callable[[], nn.Module]:
        def load() -> nn.Module:
            loads.append(name)
            return model

        return load

    candidates = {n: loader(n, near(scripted(0), a)) for n, a in (("far", 0.8), ("close", 0.1))}
    live = evaluate_many(original, candidates, windows(), batch_size=2)
    cached = evaluate_many(loader("original", original), candidates, windows(), batch_size=2, cache=tmp_path)
    assert loads == ["far", "close", "original", "far", "close"]
    assert live == cached
    assert list(tmp_path.iterdir()) == []
    assert live["close"].divergence.kl.value < live["far"].divergence.kl.value
    assert live["far"] == compare(original, near(scripted(0), 0.8), windows(), batch_size=2)


def test_the_reference_runs_once_with_a_cache(tmp_path: Path) -> None:
    original = scripted(0)
    calls: list[int] = []
    original.register_forward_hook(lambda *_: calls.append(1))
    evaluate_many(original, {n: lambda: scripted(1) for n in "abc"}, windows(), cache=tmp_path)
    assert len(calls) == len(windows())


def test_a_cache_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot keep logits in .*absent"):
        evaluate_many(scripted(0), {}, windows(), cache=tmp_path / "absent")


def test_paired_difference_has_the_sign_of_the_gap() -> None:
    original = scripted(0)
    far, close = (divergence(original, near(original, a), windows(400)) for a in (0.5, 0.4))
    gap = paired_difference(far, close)
    assert gap.value == pytest.approx(far.kl.value - close.kl.value)
    assert gap.excludes_zero
    assert gap.value > 0
    assert paired_difference(far, far).value == 0.0
    nats = compare(original, near(original, 0.5), windows(400))
    assert paired_difference(nats.candidate, nats.reference).value == pytest.approx(
        nats.candidate.nats.value - nats.reference.nats.value
    )


def test_only_equal_windows_are_compared() -> None:
    a, b = (divergence(scripted(0), scripted(1), windows(n)) for n in (60, 61))
    with pytest.raises(DataError, match=r"measured on windows .*; expected the same"):
        paired_difference(a, b)
    with pytest.raises(DataError, match="a Divergence and a Perplexity; expected two of a kind"):
        paired_difference(a, compare(scripted(0), scripted(1), windows()).candidate)


def test_another_vocabulary_is_an_error() -> None:
    class Wider(Scripted):
        def forward(self, input_ids: torch.Tensor, **_: object) -> object:
            out = super().forward(input_ids)
            out.logits = torch.cat([out.logits, out.logits[..., :1]], -1)
            return out

    with pytest.raises(ModelError, match="predicts 8 tokens and its original 7; expected one vocabulary"):
        divergence(scripted(0), Wider(scripted(0).table.detach()), windows())


def test_json_round_trip() -> None:
    found = divergence(scripted(0), scripted(1), windows())
    assert Divergence.from_json(json.loads(json.dumps(asdict(found)))) == found
