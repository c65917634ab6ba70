"""Grids: the fp16 scale and integer zero point of every group, and rounding to the nearest point of a grid.

A group of weights w gets ``w = k * s`` with integers k in [-z, levels - 1 - z]; the stored code is k + z. Scales are
rounded to fp16 before any code is computed, so codes are the best ones for the scale that is stored. A scale is never
zero and never infinite: the smallest is 2**-24, the smallest positive fp16; weights too large for the largest are a
ModelError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mopeq.errors import InputError, ModelError
from mopeq.precision import Precision
from mopeq.qtensor import Codes

__all__ = ["Grid", "fp16", "minmax", "nearest", "searched"]

TINY = 2.0**-24
"""Smallest positive fp16."""
LARGEST = 65504.0
"""Largest finite fp16."""
FACTORS = tuple(1.2 - 0.9 * i / 24 for i in range(25))
"""Multiples of the min-max scale that the search tries."""
SHIFTS = (0, -1, 1)
"""Offsets from the min-max zero point that the search tries."""
REFITS = 2
CHUNK = {"cpu": 1 << 18, "cuda": 1 << 26}
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
    start = minmax(weight, precision)
    experts, out, inp = weight.shape
    groups = start.scale.shape[-1]
    rows = weight.reshape(experts * out, groups, inp // groups)
    scale, zero = start.scale.view(-1, groups).clone(), start.zero.view(-1, groups).clone()
    heavy = None if importance is None else importance.float().reshape(experts, groups, inp // groups)
    for part in _parts(rows):
        h = None
        if heavy is not None:
            h = heavy[torch.arange(part.start, part.stop, device=rows.device) // out]
        _search(rows[part], h, scale[part], zero[part], precision, factors, refits)
    return Grid(scale.view_as(start.scale), zero.view_as(start.zero), precision)


def nearest(weight: Tensor, grid: Grid) -> Codes:
    """Codes of the nearest grid points (halves to the even multiple of the scale).

    weight: float32 (experts, out, in).
    """
    experts, out, inp = weight.shape
    groups = grid.scale.shape[-1]
    rows = weight.reshape(experts * out, groups, inp // groups)
    scale, zero = grid.scale.view(-1, groups, 1), grid.zero.view(-1, groups, 1)
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=weight.device)
    for part in _parts(rows):
        codes[part] = steps(rows[part], scale[part], zero[part], grid.precision.levels).add_(zero[part]).to(torch.uint8)
    return grid.codes(codes.view(experts, out, inp))


def steps(weight: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """Integers k of the nearest grid points k * scale, as floats; shapes broadcast."""
    return torch.minimum(torch.maximum((weight / scale).round_(), -zero), levels - 1 - zero)


def _search(
    rows: Tensor,
    h: Tensor | None,
    scale: Tensor,
    zero: Tensor,
    precision: Precision,
    factors: Sequence[float],
    refits: int,
) -> None:
    """Improve scale and zero (rows, groups) in place; rows and h (rows, groups, size)."""
    levels = precision.levels
    first_scale, first_zero = scale.clone(), zero.clone()
    best, _ = _error(rows, h, scale, zero, levels)

    def offer(s: Tensor, z: Tensor) -> None:
        nonlocal best
        error, _ = _error(rows, h, s, z, levels)
        better = error < best
        best = torch.where(better, error, best)
        scale.copy_(torch.where(better, s, scale))
        zero.copy_(torch.where(better, z, zero))

    for shift in (0,) if precision.symmetric else SHIFTS:
        z = (first_zero + shift).clamp_(0, levels - 1)
        for factor in factors:
            offer(fp16(first_scale * factor), z)
    for _ in range(refits):
        _, k = _error(rows, h, scale, zero, levels)
        hk = k if h is None else k * h
        fit = (hk * rows).sum(-1) / (hk * k).sum(-1)
        offer(fp16(torch.where(fit > 0, fit, scale)), zero)


def _error(rows: Tensor, h: Tensor | None, scale: Tensor, zero: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Weighted squared error (rows, groups) of rounding, and the integers k."""
    k = steps(rows, scale.unsqueeze(-1), zero.unsqueeze(-1), levels)
    square = (k * scale.unsqueeze(-1)).sub_(rows).square_()
    return (square if h is None else square.mul_(h)).sum(-1), k


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


def _parts(rows: Tensor) -> Iterator[slice]:
    step = max(1, CHUNK.get(rows.device.type, CHUNK["cpu"]) // max(1, rows[0].numel()))
    return (slice(i, min(i + step, len(rows))) for i in range(0, len(rows), step))
