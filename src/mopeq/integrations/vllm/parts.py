"""Packed matrices cut for one of several workers, and the flat buffers that they are loaded into. No vLLM here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from mopeq.errors import CheckpointError, InputError
from mopeq.kernels import GroupLayout, PackedGroup, Ready, ready
from mopeq.kernels.layout import PARTS
from mopeq.precision import Precision

__all__ = ["Cut", "Filling", "cut_part"]


@dataclass(frozen=True)
class Cut:
    """Which rows and inputs of a matrix (out, in) a worker holds: ``[begin, end)`` of each."""

    rows: tuple[int, int]
    inputs: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of what is held."""
        return self.rows[1] - self.rows[0], self.inputs[1] - self.inputs[0]

    def check(self, name: str, whole: tuple[int, int], precision: Precision) -> None:
        """Refuse a cut that codes, groups or zero points cannot take: they are stored in eights and in groups."""
        group = max(64 if precision.codebook else 8, precision.group_size)
        group = whole[1] if precision.hadamard else group  # a row is rotated whole
        for what, (begin, end), size, unit in (
            ("rows", self.rows, whole[0], 8),
            ("inputs", self.inputs, whole[1], group),
        ):
            if precision.bits != 16 and (begin, end) != (0, size) and (begin % unit or end % unit):
                raise InputError(
                    f"{name} is {whole[0]} x {whole[1]} at {precision}; a worker would get {what} {begin} to {end}; "
                    f"expected multiples of {unit}; serve with fewer tensor-parallel workers, or experts whole by "
                    "--enable-expert-parallel"
                )


def cut_part(stored: Tensor, part: str, precision: Precision, cut: Cut) -> Tensor:
    """The cut of one stored part (docs/format.md) of a matrix, as a view."""
    (first, last), (begin, end), bits, size = cut.rows, cut.inputs, precision.bits, precision.group_size
    if part == "qweight":
        return stored[first:last, begin * bits // 8 : end * bits // 8]
    groups = slice(None) if size == -1 else slice(begin // size, end // size)
    return stored[first:last, groups] if part == "scales" else stored[groups, first * bits // 8 : last * bits // 8]


class Filling:
    """The flat buffers of a layout as parameters ``<prefix><part>`` of a module, and what has been loaded into them."""

    def __init__(self, name: str, layer: nn.Module, prefix: str, layout: GroupLayout) -> None:
        self.name, self.layer, self.prefix, self.layout = name, layer, prefix, layout
        self.missing = {
            (expert, matrix, part)
            for expert in range(len(layout.precisions))
            for part in PARTS
            for matrix in range(len(layout.parts(expert, part)))
        }
        for part, dtype in PARTS.items():
            if layout.size(part):
                empty = torch.zeros(layout.size(part), dtype=dtype)
                layer.register_parameter(f"{prefix}{part}", nn.Parameter(empty, requires_grad=False))

    def put(self, expert: int, matrix: int, part: str, whole: Tensor, cut: Cut, shape: tuple[int, int]) -> None:
        """One stored part of a matrix ``shape``; :class:`CheckpointError` where it is not of this shape or type.

        Rows that the cut lacks (a padded vocabulary) stay zeros.
        """
        precision, dtype = self.layout.precisions[expert], PARTS[part]
        stored = GroupLayout((precision,), (shape,)).parts(0, part)  # none where the precision has no such part
        if whole.dtype != dtype or [tuple(whole.shape)] != stored:
            expected = f"{dtype} {list(stored[0])}" if stored else "none"
            raise CheckpointError(
                f"{self.name}, expert {expert}, matrix {matrix}: {part} is {whole.dtype} {list(whole.shape)}, the "
                f"checkpoint's map asks for {expected}; download or make it again"
            )
        piece = cut_part(whole, part, precision, cut)
        target = self.layout.views(self._buffer(part), part, expert)[matrix]
        target[tuple(slice(n) for n in piece.shape)].copy_(piece)
        self.missing.discard((expert, matrix, part))

    def _buffer(self, part: str) -> Tensor:
        return cast(Tensor, getattr(self.layer, f"{self.prefix}{part}")).data

    def finish(self, dtype: torch.dtype) -> Ready:
        """All that was filled, for the kernel of its device; :class:`CheckpointError` where a part is missing.

        dtype: the activations'. Parameters whose weights the kernel has copied are emptied.
        """
        if self.missing:
            expert, matrix, part = min(self.missing)
            raise CheckpointError(
                f"{self.name}: {len(self.missing)} packed tensors are missing from the checkpoint, the first is "
                f"{part} of expert {expert}, matrix {matrix}; download or make it again"
            )
        buffers: Sequence[Tensor | None] = [self._buffer(p) if self.layout.size(p) else None for p in PARTS]
        _ = self.layout.table  # made now, because Dynamo cannot look into its making
        made = ready(PackedGroup(self.layout, cast(Tensor, buffers[0]), buffers[1], buffers[2]), dtype)
        if made.kernel.copies:
            for part in PARTS:
                if self.layout.size(part):
                    getattr(self.layer, f"{self.prefix}{part}").data = self._buffer(part).new_empty(0)
        return made
