"""How many questions a model answers exactly, and how far its answers are from the original's.

Greedy decoding gives an expected answer exactly if and only if each of its tokens, the end token with them, is the
likeliest after those before it. One pass over question and answer therefore says what decoding would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mopeq.analyze.forward import inputs_of, logits_of
from mopeq.data.text import Window, fingerprint
from mopeq.errors import DataError, ModelError
from mopeq.evaluate import Evaluation
from mopeq.evaluate.bootstrap import Estimate, difference_estimate, ratio_estimate
from mopeq.evaluate.divergence import Divergence
from mopeq.evaluate.perplexity import summarize
from mopeq.evaluate.speed import resident_bytes
from mopeq.progress import Track, silent

__all__ = ["Answers", "answer_logits", "evaluate_answers", "judge_answers"]


@dataclass(frozen=True)
class Answers:
    """What one model makes of a table of questions.

    categories: of each question. right: whether it answers exactly as expected.
    tokens: of each answer, with its end token. kl: sum over them of KL(original || model), nats; empty without one.
    """

    categories: tuple[str, ...]
    right: tuple[bool, ...]
    tokens: tuple[int, ...]
    kl: tuple[float, ...] = ()

    def accuracy(self, category: str | None = None) -> Estimate:
        """Share of the questions, of one category or all, answered exactly, with its interval over questions."""
        chosen = [right for right, own in zip(self.right, self.categories, strict=True) if category in (None, own)]
        if not chosen:
            raise DataError(f"no question of category {category!r}; expected one of {sorted(set(self.categories))}")
        return ratio_estimate(chosen, [1] * len(chosen))

    def by_category(self) -> dict[str, Estimate]:
        """Accuracy of each category, in order of appearance."""
        return {category: self.accuracy(category) for category in dict.fromkeys(self.categories)}

    def divergence(self) -> Estimate:
        """KL(original || model) in nats a token of the answers, with its interval over questions."""
        if not self.kl:
            raise DataError("answers were judged without an original; expected one to compare with; give its logits")
        return ratio_estimate(self.kl, self.tokens)

    def kl_above(self, other: Answers) -> Estimate:
        """How much larger the divergence is than another model's on the same questions: a paired comparison."""
        if self.tokens != other.tokens or self.categories != other.categories:
            raise DataError("answers to other questions; expected the same table; judge both on one")
        return difference_estimate(self.kl, other.kl, self.tokens)


def answer_logits(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], track: Track = silent) -> list[Tensor]:
    """Logits of each question's answer tokens, (tokens, vocabulary) in the model's own type, on the CPU.

    ``batches`` are what :func:`mopeq.data.conversations.question_batches` makes.
    """
    device = next(model.parameters()).device
    made = []
    for batch in track(batches, "questions", len(batches)):
        with torch.inference_mode():
            logits = logits_of(model, inputs_of(batch, device)).cpu()
        asked = batch["labels"][:, 1:] != -100
        made += [row[:-1][keep] for row, keep in zip(logits, asked, strict=True)]
    if not all(bool(torch.isfinite(row).all()) for row in made):
        raise ModelError("the model gives no finite logits; expected finite ones; check its weights")
    return made


def evaluate_answers(
    reference: nn.Module, model: nn.Module, batches: Sequence[Mapping[str, Tensor]], *, track: Track = silent
) -> Evaluation:
    """Perplexity of both models on the answers of conversations, and the divergence between them; nothing else counts.

    ``batches`` are what :func:`mopeq.data.conversations.conversation_batches` makes; a conversation is a window.
    """
    if not all("labels" in batch for batch in batches):
        raise DataError("conversations kept apart for comparing have no answers; expected some; use --no-eval")
    expected, found = (answer_logits(m, batches, track) for m in (reference, model))
    windows, targets = [], []
    for batch in batches:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            targets.append(labels[labels != -100])
            windows.append(Window(ids[mask.bool()], len(targets[-1])))
    nats, reference_nats = ([_nats(*pair) for pair in zip(rows, targets, strict=True)] for rows in (found, expected))
    kl = [_kl(p, q) for p, q in zip(expected, found, strict=True)]
    agreed = [int((p.argmax(-1) == q.argmax(-1)).sum()) for p, q in zip(expected, found, strict=True)]
    tokens = tuple(w.scored for w in windows)
    return Evaluation(
        resident_bytes=resident_bytes(model),
        reference_resident_bytes=resident_bytes(reference),
        perplexity=summarize(nats, windows, None),
        reference_perplexity=summarize(reference_nats, windows, None),
        divergence=Divergence(
            kl=ratio_estimate(kl, tokens),
            agreement=ratio_estimate(agreed, tokens),
            tokens=sum(tokens),
            windows=fingerprint(windows),
            window_tokens=tokens,
            window_kl=tuple(kl),
            window_agreed=tuple(agreed),
        ),
        info={"text": "answers of conversations", "windows": len(windows)},
    )


def judge_answers(
    found: Sequence[Tensor],
    batches: Sequence[Mapping[str, Tensor]],
    categories: Sequence[str],
    original: Sequence[Tensor] | None = None,
) -> Answers:
    """Answers from the logits of :func:`answer_logits`, with the divergence from an original's."""
    labels = [row[row != -100] for batch in batches for row in batch["labels"][:, 1:]]
    right = [bool((logits.argmax(-1) == row).all()) for logits, row in zip(found, labels, strict=True)]
    kl = [_kl(p, q) for p, q in zip(original, found, strict=True)] if original is not None else []
    return Answers(tuple(categories), tuple(right), tuple(len(row) for row in labels), tuple(kl))


def _nats(logits: Tensor, targets: Tensor) -> float:
    return -float(logits.float().log_softmax(-1).gather(-1, targets[:, None]).double().sum())


def _kl(p: Any, q: Any) -> float:
    log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum().double())
