"""Grids: the fp16 scale and integer zero point of every group, and rounding to the nearest point of a grid.

A group of weights w gets ``w = k * s`` with integers k in [-z, levels - 1 - z]; the stored code is k + z. Scales are
rounded to fp16 before any code is computed, so codes are the best ones for the scale that is stored. A scale is never
zero and never infinite: the smallest is 2**-24, the smallest positive fp16; weights too large for the largest are a
ModelError.

On the CPU the compiled library does this (compiled.py) where it is. What is here on torch defines correct: the library
does the same operations in the same order, and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mopeq.errors import InputError, ModelError
from mopeq.precision import Precision
from mopeq.qtensor import Codes
from mopeq.quantizers import compiled

__all__ = ["Grid", "fp16", "minmax", "nearest", "rounded", "searched"]

TINY = 2.0**-24
"""Smallest positive fp16."""
LARGEST = 65504.0
"""Largest finite fp16."""
FACTORS = tuple(1.2 - 0.9 * i / 24 for i in range(25))
"""Multiples of the min-max scale that the search tries."""
SHIFTS = (0, -1, 1)
"""Offsets from the min-max zero point that the search tries."""
REFITS = 2
RUN = 16
"""Numbers that a sum adds up in turn."""
CHUNK = {"cpu": 1 << 17, "cuda": 1 << 26}
"""Weights searched at a time: on a CPU they stay in its cache."""


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of a batch of matrices.

    scale: float32 (experts, out, groups), every value an fp16 number; zero: float32 integers, same shape.
    """

    scale: Tensor
    zero: Tensor
    precision: Precision

    def codes(self, codes: Tensor) -> Codes:
        """Codes (experts, out, in) on this grid as a record."""
        zeros = None if self.precision.symmetric else self.zero.to(torch.uint8)
        return Codes(codes.to(torch.uint8), self.scale.to(torch.float16), zeros, self.precision)


def minmax(weight: Tensor, precision: Precision) -> Grid:
    """The finest grid on which no weight of a group is clipped by more than half a step.

    weight: float32 (experts, out, in). Asymmetric: the range of a group is first extended to include zero. The zero
    point is a code, so zero is always on the grid; a grid as fine as max - min of a group that lies on one side of
    zero could not reach it, and would clip. Symmetric: ``s = 2 max|w| / (levels - 1)``. A group of one value gets that
    value as its scale, and a group of zeros the scale 1, both without error where fp16 holds the value. A scale below
    2**-13 is an fp16 subnormal with fewer digits; its rounding can clip more than half a step, though less than 2**-25
    * levels.

    Raises :class:`ModelError` where a group's magnitude needs a scale above 65504, or is not finite.
    """
    grouped = _grouped(weight, precision)
    if compiled.takes(weight) and (made := compiled.grids(weight, precision)) is not None:
        return Grid(*made[:2], precision)
    levels = precision.levels
    low, high = grouped.amin(-1), grouped.amax(-1)
    constant = low == high
    size = torch.maximum(high, -low)
    reach = 2 * size if precision.symmetric else high.clamp_min(0) - low.clamp_max(0)
    scale = reach / (levels - 1)
    scale = torch.where(constant & (size <= LARGEST), size, scale)
    scale = fp16(torch.where(size == 0, 1.0, scale))
    _check(scale, size, precision)
    half = float(levels // 2)
    if precision.symmetric:
        return Grid(scale, torch.full_like(scale, half), precision)
    return Grid(scale, (-low.clamp_max(0) / scale).round_().clamp_(0, levels - 1), precision)


def searched(
    weight: Tensor,
    precision: Precision,
    importance: Tensor | None = None,
    *,
    factors: Sequence[float] = FACTORS,
    refits: int = REFITS,
) -> Grid:
    """The grid of least squared error among multiples of the min-max scale and neighbouring zero points.

    weight: float32 (experts, out, in). importance: float32 (experts, in), weights of the squared errors, at any scale;
    the diagonal of the input's second moments makes this the output error of independent inputs. factors: the multiples
    to try. After the search the scale is refitted ``refits`` times by least squares on the codes found,
    ``sum(h w k) / sum(h k k)``. The error of a group never exceeds that of :func:`minmax`; groups whose importance is
    all zero keep the min-max grid.
    """
    _grouped(weight, precision)
    if compiled.takes(weight, importance):
        made = compiled.grids(weight, precision, importance, factors, refits)
        if made is not None:
            return Grid(*made[:2], precision)
    start = minmax(weight, precision)
    experts, out, inp = weight.shape
    scale, zero = columns(start.scale).unsqueeze(2), columns(start.zero).unsqueeze(2)
    shape = (experts, scale.shape[1], inp // scale.shape[1], out)
    cells = columns(weight).view(shape)
    h = None if importance is None else importance.float().reshape(*shape[:3], 1)
    for some, groups, rows in _parts(*shape, CHUNK.get(weight.device.type, CHUNK["cpu"])):
        at = (some, groups, slice(None), rows)
        _search(cells[at], None if h is None else h[some, groups], scale[at], zero[at], precision, factors, refits)
    return Grid(columns(scale.squeeze(2)), columns(zero.squeeze(2)), precision)


def rounded(
    weight: Tensor,
    precision: Precision,
    importance: Tensor | None = None,
    *,
    factors: Sequence[float] = (),
    refits: int = 0,
) -> Codes:
    """Codes of the nearest points on the grids of :func:`searched`, without factors on those of :func:`minmax`.

    Arguments are theirs; where there is the library, weights pass through the processor once.
    """
    _grouped(weight, precision)
    if compiled.takes(weight, importance):
        made = compiled.grids(weight, precision, importance, factors, refits, codes=True)
        if made is not None:
            scale, zero, codes = made
            assert codes is not None
            return Grid(scale, zero, precision).codes(codes)
    if not factors:
        return nearest(weight, minmax(weight, precision))
    return nearest(weight, searched(weight, precision, importance, factors=factors, refits=refits))


def columns(batch: Tensor) -> Tensor:
    """(experts, rows, columns) as contiguous (experts, columns, rows); torch is fast at one matrix only."""
    made = batch.new_empty(len(batch), batch.shape[2], batch.shape[1])
    for into, matrix in zip(made, batch, strict=True):
        into.copy_(matrix.t())
    return made


def nearest(weight: Tensor, grid: Grid) -> Codes:
    """Codes of the nearest grid points (halves to the even multiple of the scale).

    weight: float32 (experts, out, in).
    """
    rows = _grouped(weight, grid.precision)
    if compiled.takes(weight):
        return grid.codes(compiled.codes_on(weight, grid.precision, grid.scale, grid.zero))
    scale, zero = grid.scale.unsqueeze(-1), grid.zero.unsqueeze(-1)
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=weight.device)
    count, out, groups, size = rows.shape
    for some, group, part in _parts(count, groups, size, out, CHUNK.get(weight.device.type, CHUNK["cpu"])):
        at = (some, part, group)
        codes[at] = steps(rows[at], scale[at], *bounds(zero[at], grid.precision.levels)).add_(zero[at])
    return grid.codes(codes.view(weight.shape))


def bounds(zero: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The least and the largest k of a grid."""
    return -zero, levels - 1 - zero


def steps(weight: Tensor, scale: Tensor, least: Tensor, most: Tensor, out: Tensor | None = None) -> Tensor:
    """Integers k of the nearest grid points k * scale, as floats; shapes broadcast. ``out`` takes them if given."""
    return torch.div(weight, scale, out=out).round_().clamp_(least, most)


def _search(
    cells: Tensor,
    h: Tensor | None,
    scale: Tensor,
    zero: Tensor,
    precision: Precision,
    factors: Sequence[float],
    refits: int,
) -> None:
    """Improve scale and zero (experts, groups, 1, rows) in place.

    cells: (experts, groups, size, rows), in which what is broadcast is broadcast along whole rows; h: (experts, groups,
    size, 1).
    """
    levels = precision.levels
    first_scale, first_zero, minus = scale.clone(), zero.clone(), -cells
    work = torch.empty_like(cells)

    def error(s: Tensor, z: Tensor) -> Tensor:
        """Weighted squared error (experts, groups, 1, rows) of rounding."""
        k = steps(cells, s, *bounds(z, levels), out=work)
        torch.addcmul(minus, k, s, out=k).square_()
        return summed(k if h is None else k.mul_(h))

    best = error(first_scale, first_zero)

    def offer(s: Tensor, z: Tensor) -> None:
        nonlocal best
        found = error(s, z)
        better = found < best
        best = torch.where(better, found, best)
        scale.copy_(torch.where(better, s, scale))
        zero.copy_(torch.where(better, z, zero))

    for shift in (0,) if precision.symmetric else SHIFTS:
        z = (first_zero + shift).clamp_(0, levels - 1)
        for factor in factors:
            if (shift, factor) != (0, 1):  # that is where it begins
                offer(fp16(first_scale * factor), z)
    for _ in range(refits):
        k = steps(cells, scale, *bounds(zero, levels), out=work)
        hk = k if h is None else k * h
        fit = summed(hk * cells) / summed(hk * k)
        offer(fp16(torch.where(fit > 0, fit, scale)), zero)


def summed(cells: Tensor) -> Tensor:
    """Sums (experts, groups, 1, rows) over cells (experts, groups, size, rows), in an order that is the same anywhere.

    Runs of 16 are added up in turn, and so are their sums, in runs of 16 again; what is left over of each level comes
    first, lower levels before higher ones. ``Tensor.sum`` has other orders for other processors, threads and places.
    """
    total = None
    while True:
        whole = cells.shape[2] // RUN * RUN
        rest = _in_turn(cells[:, :, whole:], 2)
        total = rest if total is None else total + rest
        if not whole:
            return total.unsqueeze(2)
        cells = _in_turn(cells[:, :, :whole].reshape(*cells.shape[:2], -1, RUN, *cells.shape[3:]), 3)


def _in_turn(cells: Tensor, axis: int) -> Tensor:
    total = cells.select(axis, 0).clone() if cells.shape[axis] else cells.sum(axis)
    for part in cells.unbind(axis)[1:]:
        total.add_(part)
    return total


def _grouped(weight: Tensor, precision: Precision) -> Tensor:
    if precision.bits == 16:
        raise ValueError("16 bits has no codes; store the matrix with qtensor.pack_full")
    if precision.codebook:
        raise InputError(f"{precision} has a codebook, which only the methods gptq and rtn-mse can use; choose one")
    if weight.dim() != 3 or weight.dtype != torch.float32:
        raise ValueError(f"weight {weight.dtype} {tuple(weight.shape)}; expected float32 (experts, out, in)")
    groups = precision.group_count(weight.shape[-1])
    return weight.reshape(*weight.shape[:2], groups, weight.shape[-1] // groups)


def fp16(scale: Tensor) -> Tensor:
    """The fp16 numbers nearest to some scales, as float32; never zero."""
    return scale.to(torch.float16).float().clamp_min_(TINY)


def _check(scale: Tensor, size: Tensor, precision: Precision) -> None:
    bad = ~(torch.isfinite(scale) & torch.isfinite(size)).flatten(1).all(1)
    if not bool(bad.any()):
        return
    first = int(bad.nonzero()[0])
    reach = LARGEST * (precision.levels - 1) / (2 if precision.symmetric else 1)
    raise ModelError(
        f"weights of magnitude {float(size[first].max()):.4g} in matrix {first} of the batch; {precision} stores "
        f"finite weights up to {reach:.4g}; keep this matrix at 16 bits, or repair the checkpoint"
    )


def _parts(experts: int, groups: int, size: int, rows: int, most: int) -> Iterator[tuple[slice, slice, slice]]:
    """Experts, groups and rows of at most ``most`` weights or one group: some whole experts, or a part of one."""
    some = max(1, most // (groups * size * rows))
    wide = min(groups, max(1, most // (size * rows)))
    tall = min(rows, max(1, most // size))
    for i in range(0, experts, some):
        for g in range(0, groups, wide):
            for j in range(0, rows, tall):
                yield slice(i, i + some), slice(g, g + wide), slice(j, j + tall)
