"""The part of the calibration text that costs are measured on, and how its costs stand for those of the whole.

Gradients and what each option does to a layer's output are most of what measuring takes, and a sum over some tokens
estimates the sum over all. What is cheap stays exact: moments, and with them every code, are of the whole text, and so
is how much an expert is used. With c the routing weights of its tokens,

    cost = (sum over the part) (sum over all of c^2) / (sum over the part of c^2) / all tokens

since the squared change of the layer's output is proportional to c^2; c = 1 where routing weights scale the input. An
expert with fewer than ``LEAST`` tokens in the part gets others of its own, evenly spread, up to that number; their
squared gradients, which were not taken, are the means of the layer's, channel by channel.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import compress
from operator import not_

import torch
from torch import Tensor, nn

from mopeq.analyze.forward import Batch, token_mask
from mopeq.analyze.observe import Routed, expert_rows, marks_of, observe
from mopeq.progress import Track, silent
from mopeq.spec import MoESpec

__all__ = [
    "LEAST", "LEAST_TOKENS", "measured_batches", "observed_in_part", "parted", "standing_for", "token_marks", "woven",
]  # fmt: skip

LEAST = 64
"""Tokens of an expert that its costs are measured on, if it has as many."""
LEAST_TOKENS = 4096
"""Tokens of a part, if there are as many."""


def measured_batches(batches: Sequence[Batch], share: float, least: int = LEAST_TOKENS) -> tuple[int, ...] | None:
    """The batches to measure costs on, evenly spread, as few as have ``share`` of all tokens, and ``least`` tokens.

    Batches of text are in random order, those of conversations in order of length. None for all.
    """
    sizes = [int(token_mask(batch).sum()) for batch in batches]
    wanted = max(share * sum(sizes), min(least, sum(sizes)))
    for count in range(1, len(sizes)):
        chosen = tuple((2 * i + 1) * len(sizes) // (2 * count) for i in range(count))
        if sum(sizes[i] for i in chosen) >= wanted:
            return chosen
    return None


def parted(batches: Sequence[Batch], measured: Collection[int] | None) -> tuple[list[Batch], list[Batch]]:
    """The batches that are measured, and the others; all and none where ``measured`` is None."""
    own = [measured is None or number in measured for number in range(len(batches))]
    return list(compress(batches, own)), list(compress(batches, map(not_, own)))


def observed_in_part(
    model: nn.Module,
    spec: MoESpec,
    batches: Sequence[Batch],
    measured: Collection[int] | None,
    *,
    gradients: bool,
    seed: int = 0,
    track: Track = silent,
) -> dict[int, Routed]:
    """As :func:`~mopeq.analyze.observe`, with gradients of the batches ``measured``; None for all."""
    own, others = parted(batches, measured)
    found = observe(model, spec, own, gradients=gradients, seed=seed, track=track)
    if not others:
        return found
    seen = observe(model, spec, others, track=track)
    return {index: woven(one, seen[index], batches, measured) for index, one in found.items()}


def token_marks(batches: Sequence[Batch], measured: Collection[int] | None) -> Tensor | None:
    """Of the tokens that are not padding, over all batches, those of the batches ``measured``: bool (tokens,); None for
    all.
    """
    if measured is None:
        return None
    sizes = [int(token_mask(batch).sum()) for batch in batches]
    return torch.cat([torch.full((size,), number in measured) for number, size in enumerate(sizes)])


def woven(own: Routed, others: Routed, batches: Sequence[Batch], measured: Collection[int] | None) -> Routed:
    """What a layer saw of all batches, from what it saw of those ``measured`` and of the others."""
    marks, (vision, weight) = token_marks(batches, measured), marks_of(batches)
    assert marks is not None

    def both(first: Tensor, other: Tensor) -> Tensor:
        made = first.new_empty(len(marks), *first.shape[1:])
        made[marks], made[~marks] = first, other
        return made

    hidden, index = both(own.hidden, others.hidden), both(own.index, others.index)
    weights = both(own.weights, others.weights)
    return Routed(hidden, index, weights, own.weighs_input, own.gradient, vision, weight, marks)


def standing_for(seen: Routed, experts: int, least: int = LEAST) -> tuple[Routed, list[float]]:
    """The tokens of a layer that costs are measured on, and what each expert's costs are multiplied by.

    The costs of the part are means per token of it; multiplied they are means per calibration token. The layer itself,
    and ones, where all tokens are measured.
    """
    if seen.measured is None:
        return seen, [1.0] * experts
    part = seen.part()
    more = []
    for rows, _ in expert_rows(seen, experts):
        inside = seen.measured[rows]
        others, missing = rows[~inside], min(least, len(rows)) - int(inside.sum())
        if missing > 0:
            more.append(others[torch.arange(missing) * len(others) // missing])
    if more:
        part = _joined(part, seen.at(torch.unique(torch.cat(more))))
    whole, own = _mass(seen, experts), _mass(part, experts)
    share = len(part.hidden) / len(seen.hidden)
    return part, torch.where(own > 0, whole / own.clamp_min(torch.finfo(own.dtype).tiny) * share, 1.0).tolist()


def _joined(part: Routed, more: Routed) -> Routed:
    """Both; the tokens of ``more`` have the mean squared gradients of the part."""
    gradient = part.gradient
    if gradient is not None:
        usual = gradient.float().square().mean(0).sqrt().to(gradient.dtype)
        gradient = torch.cat([gradient, usual.expand(len(more.hidden), -1)])
    names = ("hidden", "index", "weights", "vision", "token_weight")
    pairs = {name: (getattr(part, name), getattr(more, name)) for name in names}
    both = {name: torch.cat(pair) for name, pair in pairs.items() if pair[0] is not None}
    return replace(part, gradient=gradient, **both)  # type: ignore[arg-type]


def _mass(seen: Routed, experts: int) -> Tensor:
    """Sum of c^2 over each expert's tokens, float64 (experts,)."""
    chosen = seen.index >= 0
    c = torch.ones_like(seen.weights) if seen.weighs_input else seen.weights
    return torch.bincount(seen.index[chosen], c[chosen].double().square(), minlength=experts)
