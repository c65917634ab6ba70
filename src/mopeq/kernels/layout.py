"""How the packed matrices of one layer lie in memory: flat buffers and where each expert begins in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from mopeq.precision import Precision
from mopeq.qtensor import QTensor, packed_shapes

__all__ = ["PARTS", "GroupLayout", "PackedGroup"]

PARTS = {"qweight": torch.uint8, "scales": torch.float16, "zeros": torch.uint8}


@dataclass(frozen=True)
class GroupLayout:
    """Where the matrices of one projection group lie: expert after expert, within an expert gate, then up.

    precisions: one per expert. shapes: (out, in) of each matrix of an expert, all with the same ``in``.
    """

    precisions: tuple[Precision, ...]
    shapes: tuple[tuple[int, int], ...]

    @cached_property
    def offsets(self) -> dict[str, tuple[int, ...]]:
        """``{part: (experts + 1) first elements}`` in the part's flat buffer."""
        return {
            part: tuple(accumulate((sum(prod(s) for s in self.parts(e, part)) for e in self._all), initial=0))
            for part in PARTS
        }

    @property
    def _all(self) -> range:
        return range(len(self.precisions))

    def parts(self, expert: int, part: str) -> list[tuple[int, int]]:
        """Stored shapes of one part of an expert's matrices; empty where its precision has no such part."""
        stored = (packed_shapes(shape, self.precisions[expert]) for shape in self.shapes)
        return [found[part][0] for found in stored if part in found]

    def size(self, part: str) -> int:
        """Elements of the part's flat buffer; 0 where no expert has the part."""
        return self.offsets[part][-1]

    def views(self, buffer: Tensor, part: str, expert: int) -> list[Tensor]:
        """One view of the flat buffer for each matrix of an expert."""
        begin, made = self.offsets[part][expert], []
        for shape in self.parts(expert, part):
            made.append(buffer[begin : begin + prod(shape)].view(shape))
            begin += prod(shape)
        return made


@dataclass(frozen=True)
class PackedGroup:
    """All experts of one layer and projection group. A part that no expert has is None."""

    layout: GroupLayout
    qweight: Tensor
    scales: Tensor | None
    zeros: Tensor | None

    @property
    def experts(self) -> int:
        """Number of experts."""
        return len(self.layout.precisions)

    @property
    def out_features(self) -> int:
        """Rows of an expert's matrices together."""
        return sum(out for out, _ in self.layout.shapes)

    def matrices(self, expert: int) -> list[QTensor]:
        """The matrices of one expert, as views: gate and up, or down."""
        layout = self.layout
        qweights = layout.views(self.qweight, "qweight", expert)
        scales: Sequence[Tensor | None] = [] if self.scales is None else layout.views(self.scales, "scales", expert)
        zeros: Sequence[Tensor | None] = [] if self.zeros is None else layout.views(self.zeros, "zeros", expert)
        scales, zeros = scales or [None] * len(qweights), zeros or [None] * len(qweights)
        return [
            QTensor(q, s if s is not None else q.new_empty(shape[0], 0, dtype=torch.float16), z, shape, precision)
            for q, s, z, shape, precision in zip(
                qweights, scales, zeros, layout.shapes, [layout.precisions[expert]] * len(qweights), strict=True
            )
        ]
