"""How likely the tokens of a text are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Score", "scores"]

ROWS = 256
"""Positions that are float32 at a time."""


@dataclass(frozen=True)
class Score:
    """The natural logarithm of a token's probability after those before it.

    ``top`` has the likeliest tokens in its place with theirs, likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def scores(logits: Tensor, tokens: Sequence[int], likeliest: int) -> Iterator[Score]:
    """Of each of ``tokens``, by the row of ``logits`` (tokens, vocabulary) that foretells it."""
    for begin in range(0, len(tokens), ROWS):
        own = tokens[begin : begin + ROWS]
        logs = logits[begin : begin + ROWS].float().log_softmax(-1)
        values = logs[torch.arange(len(own)), torch.tensor(own)].tolist()
        best, places = (found.tolist() for found in logs.topk(min(likeliest, logs.shape[1])))
        for token, value, ids, logprobs in zip(own, values, places, best, strict=True):
            yield Score(token, value, tuple(zip(ids, logprobs, strict=True)))
