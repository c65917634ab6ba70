"""A layer's experts by precision, for kernels that take one precision in a call: one call for each bucket.

Rows that come sorted by expert are brought into the buckets' order, so that each bucket has a run of them. Nothing
waits for the device, for where the runs begin stays on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mopeq.kernels.layout import GroupLayout, PackedGroup
from mopeq.precision import Precision

__all__ = ["Bucket", "Stack", "buckets", "by_bucket", "stack"]


@dataclass(frozen=True)
class Bucket:
    """The experts of a layer that have one precision, ascending."""

    precision: Precision
    experts: tuple[int, ...]


@dataclass(frozen=True)
class Stack:
    """A bucket's packed matrices, those of an expert joined to one (N rows, K inputs), G groups in a row.

    qweight: uint8 (experts, N, K*bits/8); scales: float16 (experts, N, G); zeros: uint8 (experts, G, N*bits/8) or None.
    """

    precision: Precision
    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None


def buckets(layout: GroupLayout) -> tuple[Bucket, ...]:
    """One for each precision that the layout has, ascending."""
    found: dict[Precision, list[int]] = {}
    for expert, precision in enumerate(layout.precisions):
        found.setdefault(precision, []).append(expert)
    return tuple(Bucket(p, tuple(found[p])) for p in sorted(found))


def stack(packed: PackedGroup, bucket: Bucket) -> Stack:
    """Copies of a bucket's matrices. Zero points of a group lie across an expert's rows, gate's before up's."""
    stored = [packed.stored(expert) for expert in bucket.experts]
    zeros = [[q.zeros for q in row if q.zeros is not None] for row in stored]
    return Stack(
        bucket.precision,
        torch.stack([torch.cat([q.qweight for q in row]) for row in stored]),
        torch.stack([torch.cat([q.scales for q in row]) for row in stored]),
        None if bucket.precision.symmetric else torch.stack([torch.cat(row, dim=1) for row in zeros]),
    )


def by_bucket(
    x: Tensor, offsets: Tensor, found: Sequence[Bucket], columns: int,
    multiply: Sequence[Callable[[Tensor, Tensor, Tensor], None]],
) -> Tensor:  # fmt: skip
    """Rows ``x`` (rows, in), sorted by expert as ``offsets`` (experts + 1,) says, to (rows, columns); zeros elsewhere.

    Each bucket's ``multiply(rows, begins, out)`` gets all rows in the buckets' order, where those of its experts begin
    and end (its experts + 1,), and writes these rows of ``out``.
    """
    order = torch.tensor([expert for bucket in found for expert in bucket.experts], device=x.device)
    rank = torch.argsort(torch.cat((order, order.new_tensor([len(order)]))))  # rows of no expert come last
    ids = torch.searchsorted(offsets, torch.arange(len(x), device=x.device), right=True) - 1  # -1: before the first
    places = torch.argsort(rank[ids], stable=True)
    counts = offsets.diff()[order]
    begins = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    rows, out = x[places], x.new_zeros(len(x), columns)
    ends = [0]
    for bucket in found:
        ends.append(ends[-1] + len(bucket.experts))
    for (first, last), run in zip(pairwise(ends), multiply, strict=True):
        run(rows, begins[first : last + 1], out)
    result = torch.empty_like(out)
    result[places] = out
    return result
