"""Stored tensors that are read when they are asked for, into memory that goes when they go.

A mapped file counts as resident, page by page, as long as one tensor of it lives: a norm would hold a layer's experts.
"""

from __future__ import annotations

from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from types import EllipsisType

import torch
from torch import Tensor

from mopeq.safetensors_files import TYPES, read_span
from mopeq.source import Source, read_tensor

__all__ = ["Blank", "Lazy"]

LINE = 64
"""Bytes of a cache line. A tensor lies as many bytes into one as in the file: the order in which a product is summed
depends on that, and a model that is loaded whole, which is mapped, has the same sums."""


class Lazy:
    """What transformers' loading takes in place of a slice of a safetensors file: ``[...]`` is the whole tensor.

    One that another quantizer packed is dequantized. Raises :class:`ModelError` where the file is shorter than it was.
    """

    def __init__(self, source: Source, key: str) -> None:
        self.source, self.key = source, key

    def __getitem__(self, everything: EllipsisType) -> Tensor:
        source, key = self.source, self.key
        if key in source.packed or source.dtypes[key] not in TYPES:
            return read_tensor(source, key)
        dtype, begin, end = TYPES[source.dtypes[key]], *source.spans[key]
        if begin == end:
            return torch.empty(source.shapes[key], dtype=dtype)
        ahead = begin % LINE if begin % dtype.itemsize == 0 else 0
        pages = mmap(-1, ahead + end - begin, flags=MAP_PRIVATE | MAP_ANONYMOUS)  # an allocator would keep them
        read_span(source.path / source.files[key], key, begin, memoryview(pages)[ahead:])
        return torch.frombuffer(pages, dtype=dtype, offset=ahead).view(source.shapes[key])


class Blank(Lazy):
    """Zeros in a tensor's place that take no memory and read nothing: to see where it goes."""

    def __getitem__(self, everything: EllipsisType) -> Tensor:
        kind = TYPES.get(self.source.dtypes[self.key], torch.float32)
        return torch.zeros((), dtype=kind).expand(self.source.shapes[self.key])
