"""A layer's experts a few at a time, with what their quantizer needs: the unit of work whose memory is bounded.

Slabs do not depend on each other but for one number, the mean of the moments of all experts, by which those with few
tokens are filled up. So :func:`mapped` works on them with any :class:`Map`: :func:`here` one after the other,
:func:`over` several devices at once, or that of mopeq/integrations/ray.py on a cluster. The parts, and the order in
which their sums are added, are the same whoever works on them, and so are all bits of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from mopeq.analyze.moments import Moments, enough_tokens, moments
from mopeq.analyze.observe import Routed, expert_rows
from mopeq.memory import MOST, trim
from mopeq.precision import GROUPS, ProjectionGroup
from mopeq.quantizers import fallback_moments
from mopeq.source import Source, close_files, read_group
from mopeq.spec import MoELayer

__all__ = ["Layer", "Map", "Slab", "here", "mapped", "on", "over", "slabs"]

T = TypeVar("T")
Item = TypeVar("Item")
Part = tuple[int, ...]
OPEN = 16
"""Experts that are read, one by one, before their file's pages are given back: opening it reads its whole header."""


class Map(Protocol):
    """Runs ``work(shared, item, device)`` for every item and gives what they return in the order of the items."""

    def __call__(self, work: Callable[[Any, Item, torch.device], T], shared: Any, items: Sequence[Item]) -> Iterator[T]:
        """The results; ``work``, ``shared`` and the items can be pickled, and the results hold tensors on the CPU."""
        ...


def on(device: torch.device | str) -> Map:
    """One item after the other, in this process, on a device."""
    where = torch.device(device)

    def one_by_one(work: Callable[[Any, Item, torch.device], T], shared: Any, items: Sequence[Item]) -> Iterator[T]:
        return (work(shared, item, where) for item in items)

    return one_by_one


here = on("cpu")


def over(devices: Sequence[torch.device | str]) -> Map:
    """Several items at once in threads of this process, one on each device."""

    def side_by_side(work: Callable[[Any, Item, torch.device], T], shared: Any, items: Sequence[Item]) -> Iterator[T]:
        free: SimpleQueue[torch.device] = SimpleQueue()
        for device in devices:
            free.put(torch.device(device))

        def one(item: Item) -> T:
            device = free.get()
            try:
                return work(shared, item, device)
            finally:
                free.put(device)

        with ThreadPoolExecutor(len(devices), "mopeq-slab") as pool:
            yield from pool.map(one, items)

    return side_by_side


@dataclass(frozen=True)
class Slab:
    """Some experts of one layer.

    weights: float32 (n, rows, in) of each group. moments: float32 (n, in, in), filled up where tokens are few; None
    where the layer was not observed. short: ``{group: experts}`` whose moments were filled up.
    """

    experts: Part
    weights: Mapping[ProjectionGroup, Tensor]
    moments: Moments | None
    short: Mapping[ProjectionGroup, Part]


@dataclass(frozen=True)
class Layer:
    """Where the experts of a layer come from, and how many are worked on at a time.

    source: the checkpoint, from which weights are read. seen: what the layer saw of the calibration data; None makes no
    moments. module: its experts module, asked for the gate function. minimum_tokens: experts with fewer are filled up
    (:func:`~mopeq.quantizers.fallback_moments`). memory: bytes of a slab's weights and moments, all in float32; one
    expert at least.
    """

    source: Source
    layer: MoELayer
    seen: Routed | None = None
    module: nn.Module | None = None
    minimum_tokens: int | None = None
    memory: int = MOST

    @property
    def enough(self) -> dict[ProjectionGroup, int]:
        """Tokens below which a group's moments are filled up."""
        return {g: enough_tokens(self.layer.shapes(g)[0][1], self.minimum_tokens) for g in GROUPS}

    def counts(self) -> list[int]:
        """Tokens of each expert."""
        assert self.seen is not None
        return [len(rows) for rows, _ in expert_rows(self.seen, range(len(self.layer.experts)))]

    def parts(self) -> tuple[list[Part], list[Part]]:
        """The experts of each slab, those with enough tokens and those with few.

        Where nothing was observed an expert is a slab: its memory is that of the one before it, already mapped and in
        part in the processor's cache, and rounding it takes less time than the system does to find other pages.
        """
        (up, hidden), width = self.layer.shapes("gate_up")[0], self.layer.shapes("down")[0][1]
        observed = self.seen is not None and self.module is not None
        each = 4 * (3 * up * hidden + (hidden**2 + width**2 if self.seen is not None else 0))
        size = max(1, self.memory // each)
        everyone = range(len(self.layer.experts))
        if self.seen is None:
            return [(expert,) for expert in everyone], []
        counts = self.counts() if observed else []
        few = [e for e in everyone if observed and counts[e] < max(self.enough.values())]
        return _parts([e for e in everyone if e not in few], size), _parts(few, size)

    def read(self, part: Part, device: torch.device) -> dict[ProjectionGroup, Tensor]:
        """Weights of some experts; what those before them took is given back first, unless it is of use for them."""
        if self.seen is not None:
            trim()
        found = {group: read_group(self.source, self.layer, group, part).to(device) for group in GROUPS}
        if self.seen is not None or part[-1] % OPEN == OPEN - 1 or part[-1] == len(self.layer.experts) - 1:
            close_files()
        return found


def mapped(across: Map, layer: Layer, work: Callable[[Slab], T]) -> Iterator[T]:
    """What ``work`` makes of every slab of a layer, those of experts with enough tokens first.

    across: runs it, here or elsewhere; ``work`` can be pickled.
    """
    enough, few = layer.parts()
    if layer.seen is None or layer.module is None:
        yield from across(_unobserved, (layer, work), enough)
        return
    sums: dict[ProjectionGroup, Tensor] = {}

    def add(more: Mapping[ProjectionGroup, Tensor]) -> None:
        for group, summed in more.items():
            sums[group] = sums[group] + summed if group in sums else summed

    for made, more in across(_observed, (layer, work, bool(few)), enough):
        add(more)
        yield made
    for more in across(_summed, layer, few):
        add(more)
    total = sum(layer.counts())
    mean = {group: summed / total for group, summed in sums.items()} if total else {}
    yield from across(_filled, (layer, work, mean), few)


def slabs(
    source: Source,
    layer: MoELayer,
    seen: Routed | None = None,
    module: nn.Module | None = None,
    *,
    minimum_tokens: int | None = None,
    memory: int = MOST,
) -> Iterator[Slab]:
    """All slabs of a layer, in this process; arguments are those of :class:`Layer`."""
    return mapped(here, Layer(source, layer, seen, module, minimum_tokens, memory), _itself)


def _itself(slab: Slab) -> Slab:
    return slab


def _unobserved(shared: tuple[Layer, Callable[[Slab], T]], part: Part, device: torch.device) -> T:
    layer, work = shared
    return work(Slab(part, layer.read(part, device), None, dict.fromkeys(GROUPS, ())))


def _observed(
    shared: tuple[Layer, Callable[[Slab], T], bool], part: Part, device: torch.device
) -> tuple[T, dict[ProjectionGroup, Tensor]]:
    layer, work, wanted = shared
    read, found = _moments(layer, part, device)
    return work(Slab(part, read, found, dict.fromkeys(GROUPS, ()))), _sum(found) if wanted else {}


def _summed(layer: Layer, part: Part, device: torch.device) -> dict[ProjectionGroup, Tensor]:
    return _sum(_moments(layer, part, device)[1])


def _filled(
    shared: tuple[Layer, Callable[[Slab], T], Mapping[ProjectionGroup, Tensor]], part: Part, device: torch.device
) -> T:
    layer, work, mean = shared
    read, found = _moments(layer, part, device)
    tokens, own = found.tokens, {group: getattr(found, group) for group in GROUPS}
    del found  # each is let go when it is filled up
    filled, short = {}, {}
    for group in GROUPS:
        pooled = mean[group].to(device) if group in mean else None
        filled[group], which = fallback_moments(own.pop(group), tokens, layer.enough[group], pooled)
        short[group] = tuple(part[i] for i in which)
    return work(Slab(part, read, Moments(filled["gate_up"], filled["down"], tokens), short))


def _moments(layer: Layer, part: Part, device: torch.device) -> tuple[dict[ProjectionGroup, Tensor], Moments]:
    assert layer.seen is not None
    assert layer.module is not None
    read = layer.read(part, device)
    return read, moments(layer.seen, layer.module, read["gate_up"], experts=part)


def _sum(found: Moments) -> dict[ProjectionGroup, Tensor]:
    return {group: getattr(found, group).sum(0).cpu() for group in GROUPS}


def _parts(items: Sequence[int], size: int) -> list[Part]:
    return [tuple(items[i : i + size]) for i in range(0, len(items), size)]
