"""GPTQ: rounding column by column, each column's error compensated by the columns not yet rounded.

Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323. For one row w and input moments H it reduces ``(w - q) H (w - q)^T``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mopeq.errors import DataError
from mopeq.precision import Precision
from mopeq.qtensor import Codes
from mopeq.quantizers import pairs
from mopeq.quantizers.grid import Grid, minmax, searched, steps
from mopeq.quantizers.rtn import importance

__all__ = ["Factored", "factored", "gptq"]

FACTORS = tuple(1 - 0.025 * i for i in range(7))
"""Multiples of the min-max scale from which grids are chosen. None below 0.85: what one column gives up the others take
on, and need room at the ends of the grid that plain rounding does not."""
DAMPING = 0.2
"""Share of the mean diagonal that is added to the diagonal of the moments."""
LEAF = 16
"""Columns that are rounded one after the other before a matrix product takes over."""
CHUNK = 1 << 28
"""Floats of weights and moments worked on at a time (1 GiB, about three such buffers live)."""


@dataclass(frozen=True)
class Factored:
    """What GPTQ needs of moments (experts, in, in), whatever the precision.

    importance: float32 (experts, in), of the grid search. order: int64 (experts, in), in which columns are rounded.
    upper: float32 (experts, in, in), U with U^T U the inverse of the damped moments in that order.
    """

    importance: Tensor
    order: Tensor
    upper: Tensor

    def __getitem__(self, part: slice | list[int]) -> Factored:
        """Some of the matrices."""
        return Factored(self.importance[part], self.order[part], self.upper[part])


def factored(moments: Tensor, *, damping: float = DAMPING, act_order: bool = True) -> Factored:
    """What several calls of :func:`gptq` share; arguments and errors are those of it."""
    experts, inp, _ = moments.shape
    bad = (~torch.isfinite(moments.sum((1, 2)))).nonzero().flatten().tolist()
    if bad:
        raise DataError(f"moments of matrices {bad[:8]} of the batch are not finite; calibrate in float32 or bfloat16")
    moments = moments.float()
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    if act_order:
        order = diagonal.argsort(dim=-1, descending=True, stable=True)
    else:
        order = torch.arange(inp, device=moments.device).expand(experts, inp)
    return Factored(importance(moments), order, _factor(moments, order, damping))


def gptq(
    weight: Tensor,
    precision: Precision,
    moments: Tensor | Factored | None = None,
    *,
    damping: float = DAMPING,
    act_order: bool = True,
    factors: Sequence[float] = FACTORS,
) -> Codes:
    """GPTQ codes of a batch of matrices.

    weight: float32 (experts, out, in). moments: (experts, in, in), sums of x x^T over an expert's inputs, at any
    scale, or what :func:`factored` made of them; an expert with none gets the identity, that is, plain rounding on its
    grids. ``damping`` times the mean of the diagonal is added to it: more than the usual 0.01, which fits the few
    tokens an expert sees better than the tokens it will see (docs/results.md). Where the factorization fails in float32
    it is repeated in float64, with ten times more damping each time it still fails. ``act_order`` rounds columns in the
    order of falling diagonal. Grids are static: computed from the weights before any compensation and before
    reordering, so that a group is a run of neighbouring inputs whatever the order. They are those of least squared
    error (weighted by the diagonal) among the multiples ``factors`` of the min-max scale; with none, min-max grids.

    Raises :class:`DataError` without moments, or where they are not finite or not positive semidefinite.
    """
    if moments is None:
        raise DataError(
            "gptq needs the moments of calibration inputs, found none; give calibration data, or use rtn-mse"
        )
    experts, out, inp = weight.shape
    shape = tuple(moments.upper.shape if isinstance(moments, Factored) else moments.shape)
    if shape != (experts, inp, inp):
        raise ValueError(f"moments {shape}; expected {(experts, inp, inp)}")
    made = []
    step = max(1, CHUNK // (inp * (inp + out)))
    for start in range(0, experts, step):
        rows = slice(start, start + step)
        h = moments[rows]
        part = weight[rows]
        f = h if isinstance(h, Factored) else factored(h, damping=damping, act_order=act_order)
        if precision.codebook:
            made.append(pairs.compensated(part, precision, f.importance, f.order, f.upper))
            continue
        grid = minmax(part, precision)
        if factors:
            grid = searched(part, precision, f.importance, factors=factors, refits=0)
        made.append(grid.codes(_round(part, grid, f)))
    zeros = [c.zeros for c in made if c.zeros is not None]
    return Codes(
        torch.cat([c.codes for c in made]), torch.cat([c.scales for c in made]), torch.cat(zeros) if zeros else None,
        precision,
    )  # fmt: skip


def _round(weight: Tensor, grid: Grid, factors: Factored) -> Tensor:
    """Codes uint8 (experts, out, in). Columns are rows here, (experts, in, out), so that one column is contiguous."""
    out, inp = weight.shape[1:]
    levels = grid.precision.levels
    order, upper = factors.order, factors.upper
    pivot = upper.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    group = (order // (inp // grid.scale.shape[-1])).unsqueeze(-1)
    rows = order.unsqueeze(-1).expand(-1, -1, out)
    work = weight.transpose(1, 2).gather(1, rows)
    codes = torch.empty(work.shape, dtype=torch.uint8, device=weight.device)
    scales, zeros = grid.scale.transpose(1, 2).contiguous(), grid.zero.transpose(1, 2).contiguous()

    def solve(start: int, stop: int) -> None:
        """Round columns start..stop-1; their rows of ``work`` become the errors that later columns compensate."""
        if stop - start > LEAF:
            middle = start + (stop - start + LEAF) // (2 * LEAF) * LEAF
            solve(start, middle)
            factor = upper[:, start:middle, middle:stop].transpose(1, 2)
            work[:, middle:stop].baddbmm_(factor, work[:, start:middle], alpha=-1)
            solve(middle, stop)
            return
        index = group[:, start:stop].expand(-1, -1, out)
        scale, zero = scales.gather(1, index), zeros.gather(1, index)
        for j in range(start, stop):
            w, s, z = work[:, j], scale[:, j - start], zero[:, j - start]
            k = steps(w, s, z, levels)
            codes[:, j] = k + z
            w.sub_(k.mul_(s)).div_(pivot[:, j])
            work[:, j + 1 : stop].sub_(upper[:, j, j + 1 : stop, None] * w[:, None])

    solve(0, inp)
    placed: Tensor = torch.empty_like(codes).scatter_(1, rows, codes)
    return placed.transpose(1, 2).contiguous()


def _factor(moments: Tensor, order: Tensor, damping: float) -> Tensor:
    """Upper triangular U (experts, in, in) with U^T U the inverse of the damped moments in the given order of columns.

    With the columns reversed, H = L L^T gives L^-1, which reversed back is U: one factorization, no explicit inverse.
    """
    reverse = order.flip(-1)
    inp = moments.shape[-1]
    h = moments.gather(1, reverse.unsqueeze(-1).expand(-1, -1, inp)).gather(2, reverse.unsqueeze(1).expand(-1, inp, -1))
    mean = h.diagonal(dim1=-2, dim2=-1).mean(-1)
    seen = mean > 0
    h.div_(torch.where(seen, mean, 1.0)[:, None, None])
    h.diagonal(dim1=-2, dim2=-1).add_(torch.where(seen, damping, 1.0)[:, None])
    lower, info = torch.linalg.cholesky_ex(h)
    eye = torch.eye(inp, device=h.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
    for e in (info > 0).nonzero().flatten().tolist():
        inverse[e] = _factor_slowly(h[e].double(), damping).float()
    return inverse.flip(1, 2)


def _factor_slowly(h: Tensor, damping: float) -> Tensor:
    """Inverse of the Cholesky factor of one matrix in float64, with ten times more damping until it exists."""
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    more = 0.0
    while more <= 1.0:
        lower, info = torch.linalg.cholesky_ex(h + more * eye)
        if not int(info):
            made: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
            return made
        more = 10 * max(more, damping)
    raise DataError(
        f"moments are not positive semidefinite with damping {more / 10:g}; expected sums of x x^T; calibrate again"
    )
