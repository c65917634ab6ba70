"""A layer's experts a few at a time, with what their quantizer needs: the unit of work whose memory is bounded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mopeq.analyze.moments import Moments, enough_tokens, moments
from mopeq.analyze.observe import Routed, expert_rows
from mopeq.memory import MOST
from mopeq.precision import GROUPS, ProjectionGroup
from mopeq.quantizers import fallback_moments
from mopeq.source import Source, close_files, read_group
from mopeq.spec import MoELayer

__all__ = ["Slab", "slabs"]


@dataclass(frozen=True)
class Slab:
    """Some experts of one layer.

    weights: float32 (n, rows, in) of each group. moments: float32 (n, in, in), filled up where tokens are few; None
    where the layer was not observed. short: ``{group: experts}`` whose moments were filled up.
    """

    experts: tuple[int, ...]
    weights: Mapping[ProjectionGroup, Tensor]
    moments: Moments | None
    short: Mapping[ProjectionGroup, tuple[int, ...]]


def slabs(
    source: Source,
    layer: MoELayer,
    seen: Routed | None = None,
    module: nn.Module | None = None,
    *,
    minimum_tokens: int | None = None,
    memory: int = MOST,
    device: torch.device | str = "cpu",
) -> Iterator[Slab]:
    """All experts of a layer, those with enough tokens first: the others are filled up with the mean over all.

    Args:
        source: the checkpoint, from which weights are read.
        layer: which.
        seen: what it saw of the calibration data; None makes no moments.
        module: its experts module, asked for the gate function.
        minimum_tokens: experts with fewer are filled up (:func:`~mopeq.quantizers.fallback_moments`).
        memory: bytes of a slab's weights and moments, all in float32; one expert at least.
        device: where to compute.
    """
    (up, hidden), width = layer.shapes("gate_up")[0], layer.shapes("down")[0][1]
    each = 4 * (3 * up * hidden + (hidden**2 + width**2 if seen is not None else 0))
    size = max(1, memory // each)
    everyone = range(len(layer.experts))

    def weights(part: Sequence[int]) -> dict[ProjectionGroup, Tensor]:
        found = {group: read_group(source, layer, group, part).to(device) for group in GROUPS}
        close_files()
        return found

    if seen is None or module is None:
        for part in _parts(everyone, size):
            yield Slab(part, weights(part), None, dict.fromkeys(GROUPS, ()))
        return
    counts = [len(rows) for rows, _ in expert_rows(seen, everyone)]
    enough = {group: enough_tokens(layer.shapes(group)[0][1], minimum_tokens) for group in GROUPS}
    few = [e for e in everyone if counts[e] < max(enough.values())]
    sums = {"gate_up": torch.zeros(hidden, hidden, device=device), "down": torch.zeros(width, width, device=device)}

    def made(part: Sequence[int], add: bool) -> tuple[dict[ProjectionGroup, Tensor], Moments]:
        read = weights(part)
        found = moments(seen, module, read["gate_up"], experts=part)
        if add and few:
            for group in GROUPS:
                sums[group] += getattr(found, group).sum(0)
        return read, found

    for part in _parts([e for e in everyone if e not in few], size):
        read, found = made(part, add=True)
        yield Slab(part, read, found, dict.fromkeys(GROUPS, ()))
    for part in _parts(few, size):
        made(part, add=True)
    total = sum(counts)
    for part in _parts(few, size):
        read, found = made(part, add=False)
        filled, short = {}, {}
        for group in GROUPS:
            mean = sums[group] / total if total else None
            filled[group], which = fallback_moments(getattr(found, group), found.tokens, enough[group], mean)
            short[group] = tuple(part[i] for i in which)
        yield Slab(part, read, Moments(filled["gate_up"], filled["down"], found.tokens), short)


def _parts(items: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(items[i : i + size]) for i in range(0, len(items), size)]
