"""How much memory a job takes, before it begins: what is always there, and slabs of experts that can be made smaller.

The numbers are upper estimates from shapes; docs/large.md compares them with measured peaks.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mopeq.errors import InputError
from mopeq.source import Source, decoder_layer, stored_bytes
from mopeq.spec import Inventory, MoESpec, outside_layers

__all__ = [
    "Footprint", "available_bytes", "both_in_memory", "footprint", "give_back_freed", "in_large_pages", "slab_bytes",
    "spilled_bytes", "touched",
    "trim",
]  # fmt: skip

PROCESS = 600 << 20
"""Bytes of the interpreter with torch and transformers."""
SLABS = 5
"""Slab-sized buffers at a time: weights and moments, factors, work, options that are dequantized, codes."""
SHARD = 1 << 29
"""Bytes of the shard that is written while the next one is made."""
LEAST = 1 << 26
MOST = 1 << 28
"""Bytes of a slab: smaller ones only take longer to read, larger ones gain nothing."""


@dataclass(frozen=True)
class Footprint:
    """fixed: bytes that are there whatever the slabs; expert: bytes of one expert's weights and moments in float32.

    run: whether the model is run.
    """

    fixed: int
    expert: int
    run: bool = True

    @property
    def least(self) -> int:
        """The least that the job can be done in."""
        return self.fixed + SLABS * max(LEAST, self.expert)


def footprint(
    source: Source,
    spec: MoESpec,
    batches: Sequence[Mapping[str, Any]] = (),
    *,
    itemsize: int = 2,
    gradients: bool = False,
    compensate: bool = False,
) -> Footprint:
    """What packing a model takes, and, with ``batches``, running it over them layer by layer.

    Args:
        source: the checkpoint.
        spec: its specification.
        batches: of calibration; none where the model is not run.
        itemsize: bytes of an activation and of a weight in the type the model runs in.
        gradients: whether it is run backward.
        compensate: whether the packed model runs beside it (:mod:`mopeq.compensate`).
    """
    sizes = [batch["input_ids"].numel() for batch in batches]
    tokens, batch_tokens = sum(sizes), max(sizes, default=0)
    shape = max((layer.shapes("gate_up")[0] for layer in spec.layers), key=prod)
    experts = max(len(layer.experts) for layer in spec.layers)
    expert = 4 * 3 * prod(shape)
    rest = [ref.shape for ref in spec.linears] + [ref.shape for ref in spec.kept]
    largest = max(map(prod, rest), default=0)
    packed = 2 * experts * 3 * prod(shape)  # a layer's packed experts, at 16 bits at most
    if not tokens:
        return Footprint(PROCESS + max(packed + min(packed, SHARD), 8 * largest), expert, run=False)
    expert += 4 * (shape[0] ** 2 + shape[1] ** 2)
    layers: dict[int | None, list[str]] = {}
    for key in source.shapes:
        layers.setdefault(decoder_layer(key, spec.layers[0]), []).append(key)
    outside = outside_layers(spec, layers.pop(None))

    def loaded(keys: Iterable[str]) -> int:
        """Bytes of tensors as the model has them, and mapped as they are stored."""
        return sum(itemsize * prod(source.shapes[key]) + stored_bytes(source, key) for key in keys)

    hidden, top_k = shape[1], max(layer.top_k for layer in spec.layers)
    kept = tokens * (hidden * itemsize * (8 if gradients else 5) + 24 * top_k)  # images, stored, recorded, and joined
    if compensate:
        kept = max(kept, tokens * (hidden * itemsize * 9 + 48 * top_k))  # the same of two models, and their difference
    width = 3 * shape[0] + 3 * hidden
    run = batch_tokens * itemsize * (16 * hidden + 2 * top_k * width)
    vocabulary = max((ref.shape[0] for ref in spec.kept if ref.group == "embedding"), default=0)
    head = loaded(outside.last) + batch_tokens * vocabulary * (2 * itemsize + 12) if gradients else 0
    turns = loaded(outside.first), max(map(loaded, layers.values())) + run, head, packed
    return Footprint(PROCESS + loaded(outside.always) + max(turns) + kept, expert)


def spilled_bytes(spec: MoESpec, batches: Sequence[Mapping[str, Any]], *, gradients: bool) -> int:
    """Bytes of activations that lie on the disk at most: of two layers, or, with gradients, of all of them and two, and
    the experts that tokens chose.
    """
    layers = 1 + max(layer.decoder for layer in spec.layers)
    tokens: int = sum(batch["input_ids"].numel() for batch in batches)
    chosen = 12 * sum(layer.top_k for layer in spec.layers) if gradients else 0
    return tokens * (4 * max(layer.hidden_size for layer in spec.layers) * (layers + 3 if gradients else 2) + chosen)


def slab_bytes(limit: int | None, need: Footprint) -> int:
    """Bytes of a slab that keep a job below ``limit``.

    Raises :class:`InputError` with the number needed where no slab is small enough.
    """
    if limit is None:
        return MOST
    if limit < need.least:
        there = "one decoder layer and activations" if need.run else "one packed layer"
        fewer = ", or fewer --samples, or smaller batches" if need.run else ""
        raise InputError(
            f"--max-memory is {limit / 1e9:.4g} GB and this needs {_gigabytes(need.least)}: {_gigabytes(need.fixed)} "
            f"for the process, {there}, the rest for a few experts at a time; give more{fewer}"
        )
    return min(MOST, (limit - need.fixed) // SLABS)


def _gigabytes(size: int) -> str:
    """Rounded up, so that the number is enough when it is given back."""
    return f"{math.ceil(size / 1e7) / 100:.2f} GB"


def both_in_memory(inventory: Inventory, itemsize: int, packed_bytes: int, most: int | None = None) -> str:
    """Why a model of ``itemsize`` bytes a weight and a packed one do not fit in memory together; empty if they do."""
    have = min(available_bytes(), most or available_bytes())
    need = PROCESS + itemsize * inventory.parameters + packed_bytes
    return "" if need <= have else f"both together take {need / 1e9:.1f} GB and there are {have / 1e9:.1f} GB"


def available_bytes() -> int:
    """Memory that this machine has to give."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def in_large_pages(tensor: Any) -> Any:
    """The tensor, on the CPU and not yet written to, whose memory Linux was asked to give in pages of 2 MiB.

    The first touch of each page costs as much as copying into it, and decoding finds its addresses faster. What
    does not fill a page stays as it is, and a system that knows no such pages is left alone.
    """
    large, first = 2 << 20, tensor.data_ptr()
    begin, end = -(-first // large) * large, (first + tensor.nbytes) // large * large
    if tensor.device.type == "cpu" and begin < end and sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), 14)  # MADV_HUGEPAGE
    return tensor


def touched(tensors: Iterable[Any]) -> None:
    """Have the pages of mapped tensors read and in this process's tables, all at once instead of one after the other
    when they are used; a system that cannot (Linux before 5.14), or has too little memory, is left alone.
    """
    tensors = list(tensors)
    if sys.platform != "linux" or sum(tensor.nbytes for tensor in tensors) > available_bytes():
        return
    page, advise = os.sysconf("SC_PAGE_SIZE"), ctypes.CDLL(None).madvise
    for tensor in tensors:
        begin = tensor.data_ptr() // page * page
        advise(ctypes.c_void_p(begin), ctypes.c_size_t(tensor.data_ptr() + tensor.nbytes - begin), 22)  # POPULATE_READ


def give_back_freed() -> bool:
    """Let this process return large tensors' memory when they are freed; False where the C library cannot be asked.

    glibc raises the size from which it does so up to 32 MiB; below it, tensors of many sizes leave holes that grow by
    one tensor a layer while a long prompt is read. ``mallopt(M_MMAP_THRESHOLD)`` keeps that size at 1 MiB.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(-3, 1 << 20))
    except (AttributeError, OSError, TypeError):
        return False


def trim() -> None:
    """Give the pages of all that was freed back at once; where the C library cannot be asked, nothing happens.

    Tensors below 32 MiB leave holes between those that stay: without this, a layer's slabs grow by a third.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
