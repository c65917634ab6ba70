"""Exact answers by one pass are those of greedy decoding, and divergence is measured on answers alone."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mopeq.errors import DataError, ModelError
from mopeq.evaluate import Evaluation
from mopeq.evaluate.answers import answer_logits, evaluate_answers, judge_answers

VOCABULARY, END = 7, 1


class Chain(nn.Module):
    """The next token depends on the last one alone."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])

    def greedy(self, ids: list[int], most: int = 5) -> list[int]:
        made: list[int] = []
        while len(made) < most and (not made or made[-1] != END):
            made.append(int(self.table[(ids + made)[-1]].argmax()))
        return made


def batch_of(rows: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Prompts and answers, filled up on the left."""
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, labels = torch.zeros(len(rows), length, dtype=torch.int64), torch.full((len(rows), length), -100)
    for number, (prompt, answer) in enumerate(rows):
        ids[number, length - len(prompt) - len(answer) :] = torch.tensor(prompt + answer)
        labels[number, length - len(answer) :] = torch.tensor(answer)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels, "modality": torch.zeros_like(ids)}


def test_one_pass_says_what_greedy_decoding_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    model = Chain(torch.randn(VOCABULARY, VOCABULARY, generator=generator))
    rows, expected = [], []
    for start in range(2, VOCABULARY):
        truth = model.greedy([3, start])
        rows += [([3, start], truth), ([start], [*truth[:-1], (truth[-1] + 1) % VOCABULARY])]
        expected += [True, False]
    batches = [batch_of(rows[:4]), batch_of(rows[4:])]
    found = judge_answers(answer_logits(model, batches), batches, ["all"] * len(rows))
    assert list(found.right) == expected
    assert found.accuracy().value == 0.5
    assert list(found.tokens) == [len(answer) for _, answer in rows]
    with pytest.raises(DataError, match="without an original"):
        found.divergence()


def test_divergence_is_of_answers_and_paired() -> None:
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(VOCABULARY, VOCABULARY, generator=generator)
    near, far = table + 0.1 * torch.randn(table.shape, generator=generator), table.flip(0)
    rows = [([3, 4], [5, 1]), ([6], [2, 3, 1])]
    batches = [batch_of(rows)]
    original = answer_logits(Chain(table), batches)
    judged = [judge_answers(answer_logits(Chain(t), batches), batches, ["a", "b"], original) for t in (near, far)]
    p, q = table.log_softmax(-1), near.log_softmax(-1)
    by_hand = [sum(float((p[t].exp() * (p[t] - q[t])).sum()) for t in before) for before in ([4, 5], [6, 2, 3])]
    assert judged[0].kl == pytest.approx(by_hand, abs=1e-6)
    assert judged[0].divergence().value == pytest.approx(sum(by_hand) / 5, abs=1e-6)
    above = judged[1].kl_above(judged[0])
    assert above.value == pytest.approx(judged[1].divergence().value - judged[0].divergence().value)
    assert list(judged[0].by_category()) == ["a", "b"]
    with pytest.raises(DataError, match="no question of category"):
        judged[0].accuracy("c")
    other = judge_answers(original[:1], [batch_of(rows[:1])], ["a"], original[:1])
    with pytest.raises(DataError, match="other questions"):
        judged[0].kl_above(other)


def test_evaluation_of_answers_is_the_sum_over_them() -> None:
    generator = torch.Generator().manual_seed(2)
    table = torch.randn(VOCABULARY, VOCABULARY, generator=generator)
    other = table + 0.3 * torch.randn(table.shape, generator=generator)
    batches = [batch_of([([3, 4], [5, 1]), ([6], [2, 3, 1])])]
    found = evaluate_answers(Chain(table), Chain(other), batches)
    p, q = table.log_softmax(-1), other.log_softmax(-1)
    steps = [(4, 5), (5, 1), (6, 2), (2, 3), (3, 1)]
    assert found.perplexity is not None
    assert found.reference_perplexity is not None
    assert found.divergence is not None
    assert found.perplexity.nats.value == pytest.approx(-sum(float(q[a, b]) for a, b in steps) / 5, abs=1e-6)
    assert found.reference_perplexity.nats.value == pytest.approx(-sum(float(p[a, b]) for a, b in steps) / 5, abs=1e-6)
    kl = sum(float((p[a].exp() * (p[a] - q[a])).sum()) for a, _ in steps) / 5
    assert found.divergence.kl.value == pytest.approx(kl, abs=1e-6)
    agreed = sum(int(p[a].argmax() == q[a].argmax()) for a, _ in steps) / 5
    assert found.divergence.agreement.value == pytest.approx(agreed)
    assert Evaluation.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert found.info["text"] == "answers of conversations"
    alone = evaluate_answers(None, Chain(other), batches)
    assert (alone.perplexity, alone.divergence, alone.reference_perplexity) == (found.perplexity, None, None)
    unlabelled = [{name: value for name, value in batches[0].items() if name != "labels"}]
    unlabelled[0]["modality"][0, 1] = 1  # the 4 of 3, 4, 5, 1
    text = evaluate_answers(None, Chain(other), unlabelled)
    assert text.perplexity is not None
    assert text.info["text"] == "text of conversations"
    assert text.perplexity.window_tokens == (2, 3)
    assert text.perplexity.nats.value == pytest.approx(
        -sum(float(q[a, b]) for a, b in [(4, 5), (5, 1), (6, 2), (2, 3), (3, 1)]) / 5, abs=1e-6
    )
    first = {"input_ids": torch.tensor([[2, 3, 4]]), "attention_mask": torch.tensor([[0, 1, 1]])}
    only = evaluate_answers(None, Chain(other), [first]).perplexity
    assert only is not None
    assert only.window_nats == pytest.approx([-float(q[3, 4])], abs=1e-6)  # nothing is predicted from padding


def test_a_broken_model_is_found() -> None:
    with pytest.raises(ModelError, match="no finite logits"):
        answer_logits(Chain(torch.full((VOCABULARY, VOCABULARY), math.nan)), [batch_of([([3], [1])])])
