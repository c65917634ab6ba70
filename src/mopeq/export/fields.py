"""Fields: how an exported matrix is stored, and how a map becomes one that a stock runtime takes, without rounding.

A code q with zero point z stands for the integer k = q - z, and the weight is ``k * scale``. With b bits, k of a
symmetric matrix lies in [-2^(b-1), 2^(b-1) - 1] and k of one with zero points in [-(2^b - 1), 2^b - 1]; the signed
integers of b, or b + 1, bits hold them all. The points of a codebook are integers in [-16, 16], which take 6 bits. A
wider field and smaller groups hold the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mopeq.precision import FULL, Precision
from mopeq.qtensor import QTensor, integers, unpack

__all__ = ["Field", "Stored", "centred", "common", "regrouped", "signed_bits"]


class Stored(Protocol):
    """How a matrix is stored; prints as a person would say it."""

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Bytes of a matrix."""
        ...


@dataclass(frozen=True, order=True)
class Field:
    """Signed integers of ``bits``, one fp16 scale per ``group_size`` inputs (-1: a row); from 16 bits on, floats."""

    bits: int
    group_size: int = -1

    def __str__(self) -> str:
        return f"{self.bits}-bit floats" if self.bits >= 16 else f"int{self.bits}, groups of {self.group_size}"

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Bytes of a matrix: integers and scales."""
        groups = 0 if self.bits >= 16 else 1 if self.group_size == -1 else in_features // self.group_size
        return out_features * in_features * self.bits // 8 + 2 * out_features * groups


def signed_bits(precision: Precision) -> int:
    """Bits of the signed integers that hold every ``code - zero`` of a precision."""
    return 6 if precision.codebook else precision.bits if precision.symmetric else precision.bits + 1


def common(precisions: Iterable[Precision], widths: Sequence[int]) -> Field | None:
    """The narrowest field of ``widths`` that holds matrices of all ``precisions`` exactly; None where there is none.

    There is none for rotated inputs: only weights for inputs as they are can be said.
    """
    found = set(precisions)
    if found == {FULL}:
        return Field(16)
    fits = [width for width in sorted(widths) if width >= max(map(signed_bits, found))]
    if FULL in found or not fits or any(p.hadamard for p in found):
        return None
    grouped = [p.group_size for p in found if p.group_size != -1]
    return Field(fits[0], min(grouped) if grouped else -1)


def centred(matrix: QTensor) -> tuple[Tensor, Tensor]:
    """Integers k = code - zero, int16 (out, in), and scales, float16 (out, groups)."""
    codes = unpack(matrix)
    return integers(codes), codes.scales


def regrouped(scales: Tensor, inputs: int, group_size: int) -> Tensor:
    """Scales (out, groups) of rows of ``inputs`` for smaller groups; each is there several times."""
    groups = 1 if group_size == -1 else inputs // group_size
    return scales.repeat_interleave(groups // scales.shape[1], dim=1)
