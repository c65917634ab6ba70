"""AutoRound's own packing (``auto_round``): every matrix with its width, groups and zero points as they are.

Its ``qzeros`` are zero points at the code's width, and ``extra_config`` gives every module its own; so experts of one
layer may differ, and nothing is rounded or widened. Its bit strings are those of docs/format.md, with the words of a
matrix transposed. (The packing ``auto_round:auto_gptq`` stores zero points less one and cannot say 0.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopeq.export.fields import Field
from mopeq.export.folder import PackedFolder
from mopeq.precision import FULL, Precision
from mopeq.qtensor import QTensor, pack_bits

__all__ = ["Kept", "named", "packed", "plan", "quantization_config"]


@dataclass(frozen=True)
class Kept:
    """A matrix at its own precision; a symmetric one gets zero points, because every reader looks for them."""

    precision: Precision

    def __str__(self) -> str:
        return f"{self.precision}, as it is"

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Bytes of a matrix: codes, scales and zero points."""
        return Precision(self.precision.bits, self.precision.group_size).nbytes(out_features, in_features)


def plan(folder: PackedFolder) -> dict[str, Kept | Field]:
    """``{base name: how it is stored}``: as it is, or 16 bits where there is a codebook, or inputs are rotated, or rows
    or columns do not fill words of 32 codes.
    """

    def kept(shape: tuple[int, int], p: Precision) -> bool:
        return p != FULL and not p.codebook and not p.hadamard and not any(n % 32 for n in shape)

    return {
        base: Kept(precision) if kept(shape, precision) else Field(16)
        for base, shape, precision in folder.manifest.matrices()
    }


def named(folder: PackedFolder, name: str) -> str:
    """The name that transformers' modules give a tensor or module: AutoRound switches the conversion of names off.

    Experts are ``<module>.<expert>.gate_proj``, ``up_proj`` and ``down_proj``, whatever a family's files say.
    """
    for places in folder.manifest.experts.values():
        block = places.tensors.removesuffix("experts")
        if name.startswith(block):
            inside = places.module.removesuffix("experts") + name.removeprefix(block)
            if not name.startswith(places.tensors + "."):
                return inside
            number, matrix, *suffix = name.removeprefix(places.tensors + ".").split(".")
            plain = ("gate_proj", "up_proj", "down_proj")[places.names.index(matrix)]
            return ".".join([places.module, number, plain, *suffix])
    return name


def packed(matrix: QTensor) -> dict[str, Tensor]:
    """``{suffix: tensor}``: ``qweight`` int32 (in * bits / 32, out), ``qzeros`` int32 (groups, out * bits / 32),
    ``scales`` float16 (groups, out).
    """
    bits = matrix.precision.bits
    zeros = matrix.zeros
    if zeros is None:
        middle = torch.full(matrix.scales.T.shape, 1 << (bits - 1), dtype=torch.uint8)
        zeros = pack_bits(middle, bits)
    return {
        "qweight": matrix.qweight.view(torch.int32).T,
        "qzeros": zeros.contiguous().view(torch.int32),
        "scales": matrix.scales.T,
    }


def quantization_config(folder: PackedFolder, plan: Mapping[str, Kept | Field]) -> dict[str, Any]:
    """The block of ``config.json``: the most common precision, and every module at another by name."""
    made = {base: stored.precision if isinstance(stored, Kept) else FULL for base, stored in plan.items()}
    made |= dict.fromkeys(folder.plain_modules(), FULL)
    usual = Counter(p for p in made.values() if p != FULL).most_common(1)
    first = usual[0][0] if usual else Precision(4)
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round",
        "data_type": "int",
        **_scheme(first),
        "extra_config": {named(folder, base): _scheme(p) for base, p in made.items() if p != first},
    }


def _scheme(precision: Precision) -> dict[str, Any]:
    if precision == FULL:
        return {"bits": 16}
    return {"bits": precision.bits, "group_size": precision.group_size, "sym": precision.symmetric}
