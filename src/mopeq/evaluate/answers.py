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

from mopeq.analyze.forward import inputs_of, logits_of, token_mask, vision_mask
from mopeq.data.text import Window, fingerprint
from mopeq.errors import DataError, ModelError
from mopeq.evaluate import Evaluation
from mopeq.evaluate.bootstrap import RESAMPLES, Estimate, difference_estimate, ratio_estimate
from mopeq.evaluate.divergence import Divergence
from mopeq.evaluate.perplexity import summarize
from mopeq.evaluate.speed import resident_bytes
from mopeq.progress import Track, silent

__all__ = ["Answers", "answer_logits", "evaluate_answers", "judge_answers"]


@dataclass(frozen=True)
class Answers:
    """What one model makes of a table of questions.

    categories: of each question. right: how right each answer is, 0 to 1; whether it is exactly as expected, 0 or 1.
    tokens: of each answer, with its end token. kl: sum over them of KL(original || model), nats; empty without one.
    texts: what it answered; empty where the expected answers were judged instead of generating.
    """

    categories: tuple[str, ...]
    right: tuple[float, ...]
    tokens: tuple[int, ...]
    kl: tuple[float, ...] = ()
    texts: tuple[str, ...] = ()

    def accuracy(self, category: str | None = None) -> Estimate:
        """Mean of ``right`` over the questions of one category or all, with its interval over questions."""
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
    reference: nn.Module | None,
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    track: Track = silent,
) -> Evaluation:
    """Perplexity of a model on the answers of conversations, with an original also its own and the divergence from it.

    ``batches`` are what :func:`mopeq.data.conversations.conversation_batches` makes; a conversation is a window.
    Nothing but answers counts, unless some batch does not tell which they are (no ``labels``): then all text does, and
    images never. Logits are kept for one batch at a time.
    """
    answers = all("labels" in batch for batch in batches)
    batches = batches if answers else [_with_text(batch) for batch in batches]
    windows: list[Window] = []
    nats, reference_nats, kl = list[float](), list[float](), list[float]()
    agreed: list[int] = []
    for batch in track(batches, "conversations", len(batches)):
        found = answer_logits(model, [batch])
        expected = found if reference is None else answer_logits(reference, [batch])
        for row, (p, q) in enumerate(zip(expected, found, strict=True)):
            labels = batch["labels"][row]
            targets = labels[labels != -100]
            windows.append(Window(batch["input_ids"][row][batch["attention_mask"][row].bool()], len(targets)))
            nats.append(_nats(q, targets))
            if reference is None:
                continue
            if p.shape != q.shape:
                raise ModelError(
                    f"the model predicts {q.shape[-1]} tokens and its original {p.shape[-1]}; expected one vocabulary; "
                    "compare a model with the one it was made from"
                )
            reference_nats.append(_nats(p, targets))
            kl.append(_kl(p, q))
            agreed.append(int((p.argmax(-1) == q.argmax(-1)).sum()))
    tokens = tuple(w.scored for w in windows)
    drawn: dict[str, int] = {"seed": seed, "resamples": resamples}
    compared: dict[str, Any] = {}
    if reference is not None:
        compared = {
            "reference_resident_bytes": resident_bytes(reference),
            "reference_perplexity": summarize(reference_nats, windows, None, **drawn),
            "divergence": Divergence(
                kl=ratio_estimate(kl, tokens, **drawn),
                agreement=ratio_estimate(agreed, tokens, **drawn),
                tokens=sum(tokens),
                windows=fingerprint(windows),
                window_tokens=tokens,
                window_kl=tuple(kl),
                window_agreed=tuple(agreed),
            ),
        }
    return Evaluation(
        resident_bytes=resident_bytes(model),
        perplexity=summarize(nats, windows, None, **drawn),
        info={"text": f"{'answers' if answers else 'text'} of conversations", "windows": len(windows)},
        **compared,
    )


def _with_text(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch with ``labels`` at every text token that has one before it."""
    ids, real = batch["input_ids"], token_mask(batch)
    vision = vision_mask(batch)
    scored = real if vision is None else real & ~vision
    scored = scored & torch.cat([torch.zeros_like(real[:, :1]), real[:, :-1]], 1)
    return {**batch, "labels": torch.where(scored, ids, -100)}


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
