"""Packing the MoE layers of a model one after the other, while the calibration data go through the original."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from mopeq.analyze import Routed
from mopeq.checkpoint import Stored
from mopeq.journal import Journal
from mopeq.measure import Prepared
from mopeq.pack import LayerTensors
from mopeq.precision import PrecisionMap
from mopeq.progress import Track, silent
from mopeq.quantizers import DATA_FREE
from mopeq.spec import MoELayer
from mopeq.stream import Shell, Store, forward

__all__ = ["layerwise"]


def layerwise(
    opened: Prepared, precisions: PrecisionMap, journal: Journal, dtype: torch.dtype | None, method: str,
    pack: Callable[..., Iterable[Stored]], track: Track = silent,
) -> tuple[LayerTensors, Callable[[], None]]:  # fmt: skip
    """What packs a layer, running the model up to it where the quantizer needs what it saw, and lets go of the model.

    pack: :func:`~mopeq.pack.pack_experts`, but for what the layer decides.
    """
    sweep: Iterator[tuple[MoELayer, nn.Module, Routed]] | None = None

    def tensors(layer: MoELayer, short: list[str]) -> Iterable[Stored]:
        nonlocal sweep
        seen, module = None, None
        if method not in DATA_FREE:
            if sweep is None:
                shell = Shell(opened.source, opened.spec, dtype)
                sweep = forward(shell, opened.batches, Store(journal), until=layer.decoder, track=track)
            seen, module = next((routed, experts) for at, experts, routed in sweep if at.index == layer.index)
        return pack(layer, precisions, method, short, seen, module)

    def release() -> None:
        nonlocal sweep
        deque(sweep or (), maxlen=0)
        sweep = None

    return tensors, release
