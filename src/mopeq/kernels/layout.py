"""How the packed matrices of one layer lie in memory: flat buffers and where each expert begins in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from mopeq.kernels.panels import BLOCK, from_panels
from mopeq.precision import Precision
from mopeq.qtensor import QTensor, packed_shapes

__all__ = ["PARTS", "Form", "GroupLayout", "PackedGroup"]

Form = Literal["plain", "panels"]
"""Order of the bytes in a matrix's parts: as in a checkpoint (docs/format.md), or as in panels.py."""

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

    @cached_property
    def has_panels(self) -> bool:
        """Whether every matrix that is not at 16 bits, and their common input, can be turned into panels."""
        inputs = self.shapes[0][1]
        sizes = {p.group_size for p in self.precisions if p.bits != 16 and p.group_size > 0}
        return inputs % BLOCK == 0 and all(size % BLOCK == 0 for size in sizes)

    @property
    def has_codebooks(self) -> bool:
        """Whether codes of some matrices are points of a codebook."""
        return any(p.codebook for p in self.precisions)

    @property
    def is_rotated(self) -> bool:
        """Whether some matrices are for rotated inputs."""
        return any(p.hadamard for p in self.precisions)

    @cached_property
    def table(self) -> Tensor:
        """int64 (experts, matrices, 8), for compiled kernels: bits, group size in inputs, kind (0 with zero points,
        1 symmetric, 2 codebook; 4 more for rotated inputs), rows, inputs, and first elements of codes, scales and zero
        points.
        """
        rows: list[list[list[int]]] = []
        for expert, precision in enumerate(self.precisions):
            at = [self.offsets[part][expert] for part in PARTS]
            rows.append([])
            for out, inp in self.shapes:
                size = inp if precision.group_size == -1 else precision.group_size
                kind = (2 if precision.codebook else int(precision.symmetric)) + 4 * precision.hadamard
                rows[-1].append([precision.bits, size, kind, out, inp, *at])
                stored = packed_shapes((out, inp), precision)
                at = [
                    begin + (prod(stored[part][0]) if part in stored else 0)
                    for begin, part in zip(at, PARTS, strict=True)
                ]
        return torch.tensor(rows, dtype=torch.int64, device="cpu")

    @cached_property
    def kept(self) -> dict[torch.device, Any]:
        """What the kernel of a device has made of the layout; the layout pickles without it."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "kept"}

    @cached_property
    def left_out(self) -> Tensor | None:
        """The experts that are not there, bool (experts,); None where all are."""
        gone = [precision.bits == 0 for precision in self.precisions]
        return torch.tensor(gone, device="cpu") if any(gone) else None

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
    """All experts of one layer and projection group, in flat buffers. A part that no expert has is None."""

    layout: GroupLayout
    qweight: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    form: Form = "plain"

    @property
    def experts(self) -> int:
        """Number of experts."""
        return len(self.layout.precisions)

    @property
    def out_features(self) -> int:
        """Rows of an expert's matrices together."""
        return sum(out for out, _ in self.layout.shapes)

    def matrices(self, expert: int) -> list[QTensor]:
        """The matrices of one expert, gate and up, or down: views, plain copies of panels, none if it is left out."""
        stored = self.stored(expert)
        return stored if self.form == "plain" else [from_panels(q) for q in stored]

    def stored(self, expert: int) -> list[QTensor]:
        """The same as views of the buffers, whatever their form."""
        layout = self.layout
        if layout.precisions[expert].bits == 0:
            return []
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
