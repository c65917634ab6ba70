"""Questions about held-out text: which of some continuations is the real one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mopeq.data.text import read_texts

CONTEXT, ANSWER, CHOICES = 48, 12, 4
"""Tokens of a context and of a continuation, and how many continuations there are."""


@dataclass(frozen=True)
class Question:
    """Token ids of a context and of its continuations, the real one first; the others are of the same file."""

    context: list[int]
    choices: list[list[int]]


def questions(files: Sequence[str], tokenizer: Any, count: int, seed: int = 0) -> list[Question]:
    """Evenly from all files, none twice. Raises ValueError where a file has too little text."""
    draw = random.Random(seed)
    size = CONTEXT + ANSWER
    made: list[Question] = []
    for number, path in enumerate(files):
        wanted = count * (number + 1) // len(files) - count * number // len(files)
        ids = tokenizer("\n".join(read_texts(path)), add_special_tokens=False)["input_ids"]
        parts = [ids[at : at + size] for at in range(0, len(ids) - size, size)]
        for at in draw.sample(range(len(parts)), wanted):
            others = draw.sample([i for i in range(len(parts)) if i != at], CHOICES - 1)
            made.append(Question(parts[at][:CONTEXT], [parts[i][CONTEXT:] for i in (at, *others)]))
    return made


@torch.no_grad()
def margins(model: nn.Module, asked: Sequence[Question], batch: int = 32) -> list[float]:
    """Nats by which the real continuation of each question is ahead of the best other one; right if more than 0.

    A context is read once for all its continuations.
    """
    found: list[float] = []
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        contexts = torch.tensor([question.context for question in part])
        read = model(input_ids=contexts, use_cache=True, logits_to_keep=1)
        read.past_key_values.batch_repeat_interleave(CHOICES)
        rows = torch.tensor([choice for question in part for choice in question.choices])
        said = model(input_ids=rows[:, :-1], past_key_values=read.past_key_values).logits
        logits: Tensor = torch.cat([read.logits.repeat_interleave(CHOICES, 0), said], 1).float()
        nats = logits.log_softmax(-1).gather(-1, rows[..., None]).sum((1, 2)).view(len(part), -1)
        found += (nats[:, 0] - nats[:, 1:].max(-1).values).tolist()
    return found
