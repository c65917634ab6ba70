"""Every unit of a layer at every option, packed, on disk: quantized once for the costs, and not again for the map.

The files lie in the folder of a journal until the checkpoint is finished. They take as many bytes as the experts would
at each option together; see :func:`candidate_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from mopeq.checkpoint import write_tensors
from mopeq.errors import OutputError
from mopeq.journal import Journal
from mopeq.precision import GROUPS, LEFT_OUT, MATRICES, Precision, PrecisionMap, ProjectionGroup
from mopeq.qtensor import Codes, QTensor, on_cpu, pack, pack_full, packed_shapes, rows_of
from mopeq.source import Source, read_matrix
from mopeq.spec import Inventory, MoELayer, WeightRef

__all__ = ["Candidates", "Stock", "candidate_bytes", "chosen", "packed_codes"]

FILE_BYTES = 1 << 28
"""Bytes held until they are written."""


def candidate_bytes(inventory: Inventory, options: Sequence[Precision]) -> int:
    """Bytes of all units at all options below 16 bits."""
    below = [p for p in options if p.bits < 16]
    units = ((layer, group) for layer in inventory.layers for group in GROUPS)
    return sum(inventory.experts[layer] * inventory.unit_bytes(layer, g, p) for layer, g in units for p in below)


def packed_codes(group: ProjectionGroup, experts: Sequence[int], codes: Codes) -> dict[str, Tensor]:
    """The codes (experts, rows, in) of some experts packed, by the names that :class:`Candidates` stores them under."""
    made = {}
    codes = on_cpu(codes)
    for i, expert in enumerate(experts):
        for matrix, one in zip(MATRICES[group], rows_of(codes[i], len(MATRICES[group])), strict=True):
            packed = pack(one)
            for suffix in packed_shapes(packed.shape, packed.precision):
                made[_key(expert, matrix, codes.precision, suffix)] = getattr(packed, suffix)
    return made


class Candidates:
    """Takes the packed units of one layer and writes them, some at a time."""

    def __init__(self, folder: Path, below: str, layer: MoELayer) -> None:
        self.folder, self.below, self.layer = folder, below, layer
        self._held: dict[str, Tensor] = {}
        self._bytes = 0
        self._files: dict[str, Mapping[str, Any]] = {}

    def __call__(self, packed: Mapping[str, Tensor]) -> None:
        """Hold what :func:`packed_codes` made."""
        self._held |= packed
        self._bytes += sum(tensor.nbytes for tensor in packed.values())
        if self._bytes > FILE_BYTES:
            self._flush()

    def finish(self) -> dict[str, Mapping[str, Any]]:
        """Write what is left; the files, for the journal."""
        self._flush()
        return self._files

    def _flush(self) -> None:
        if not self._held:
            return
        name = f"{self.below}/options-{self.layer.index:05}-{len(self._files):05}.safetensors"
        self._files[name], _ = write_tensors(self.folder / name, self._held)
        self._held, self._bytes = {}, 0


class Stock:
    """Reads what :class:`Candidates` wrote of one layer; ``step`` is the one of the journal that wrote it."""

    def __init__(self, journal: Journal, step: str, source: Source, layer: MoELayer) -> None:
        self.folder, self.source, self.layer = journal.folder, source, layer
        self._where: dict[str, Any] = {}
        for name in journal.files(step):
            stored: Any = safe_open(journal.folder / name, "pt")
            self._where.update(dict.fromkeys(stored.keys(), stored))

    def unit(self, expert: int, group: ProjectionGroup, precision: Precision) -> list[QTensor]:
        """The matrices of a unit at a precision, gate and up, or down; 16 bits anew, none at 0 bits.

        Raises :class:`OutputError` where one is not among the candidates.
        """
        if precision == LEFT_OUT:
            return []
        refs = zip(MATRICES[group], self.layer.experts[expert].refs(group), strict=True)
        return [self._matrix(expert, matrix, ref, precision) for matrix, ref in refs]

    def _matrix(self, expert: int, matrix: str, ref: WeightRef, precision: Precision) -> QTensor:
        if precision.bits == 16:
            return pack_full(read_matrix(self.source, ref))
        keys = {s: _key(expert, matrix, precision, s) for s in packed_shapes(ref.shape, precision)}
        if missing := [key for key in keys.values() if key not in self._where]:
            raise OutputError(f"{self.folder} has no {missing[0]}; remove it and begin again")
        parts = {suffix: self._where[key].get_tensor(key) for suffix, key in keys.items()}
        return QTensor(parts["qweight"], parts["scales"], parts.get("zeros"), ref.shape, precision)


def chosen(stock: Stock, precisions: PrecisionMap) -> Iterator[tuple[str, QTensor]]:
    """The packed matrices of a layer that a map chooses, in the order experts, then gate, up, down."""
    for number, expert in enumerate(stock.layer.experts):
        for group in GROUPS:
            made = stock.unit(number, group, precisions.of(stock.layer.index, number, group))
            yield from zip((expert.names[matrix] for matrix in MATRICES[group]), made, strict=bool(made))


def _key(expert: int, matrix: str, precision: Precision, suffix: str) -> str:
    return f"{expert}.{matrix}.{precision}.{suffix}"
