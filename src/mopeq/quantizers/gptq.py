"""GPTQ: rounding column by column, each column's error compensated by the columns not yet rounded.

Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323. For one row w and input moments H it reduces ``(w - q) H (w - q)^T``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mopeq.errors import DataError
from mopeq.precision import Precision
from mopeq.qtensor import Codes
from mopeq.quantizers.grid import Grid, minmax, searched, steps
from mopeq.quantizers.rtn import importance

__all__ = ["gptq"]

FACTORS = tuple(1 - 0.025 * i for i in range(7))
"""Multiples of the min-max scale from which grids are chosen. None below 0.85: what one column gives up the others take
on, and need room at the ends of the grid that plain rounding does not."""
LEAF = 16
"""Columns that are rounded one after the other before a matrix product takes over."""
CHUNK = 1 << 28
"""Floats of weights and moments worked on at a time (1 GiB, about three such buffers live)."""


def gptq(
    weight: Tensor,
    precision: Precision,
    moments: Tensor | None = None,
    *,
    damping: float = 0.2,
    act_order: bool = True,
    factors: Sequence[float] = FACTORS,
) -> Codes:
    """GPTQ codes of a batch of matrices.

    weight: float32 (experts, out, in). moments: (experts, in, in), sums of x x^T over an expert's inputs, at any
    scale; an expert with none gets the identity, that is, plain rounding on its grids. ``damping`` times the mean of
    the diagonal is added to it: more than the usual 0.01, which fits the few tokens an expert sees better than the
    tokens it will see (docs/results.md). Where the factorization fails in float32 it is repeated in float64, with ten
    times more damping each time it still fails. ``act_order`` rounds columns in the order of falling diagonal. Grids
    are static: computed from the weights before any compensation and before reordering, so that a group is a run of
    neighbouring inputs whatever the order. They are those of least squared error (weighted by the diagonal) among the
    multiples ``factors`` of the min-max scale; with none, min-max grids.

    Raises :class:`DataError` without moments, or where they are not finite or not positive semidefinite.
    """
    if moments is None:
        raise DataError(
            "gptq needs the moments of calibration inputs, found none; give calibration data, or use rtn-mse"
        )
    experts, out, inp = weight.shape
    if moments.shape != (experts, inp, inp):
        raise ValueError(f"moments {tuple(moments.shape)}; expected {(experts, inp, inp)}")
    bad = (~torch.isfinite(moments.sum((1, 2)))).nonzero().flatten().tolist()
    if bad:
        raise DataError(f"moments of matrices {bad[:8]} of the batch are not finite; calibrate in float32 or bfloat16")
    codes, grids = [], []
    step = max(1, CHUNK // (inp * (inp + out)))
    for i in range(0, experts, step):
        part, h = weight[i : i + step], moments[i : i + step].float()
        grid = minmax(part, precision)
        if factors:
            grid = searched(part, precision, importance(h), factors=factors, refits=0)
        grids.append(grid)
        codes.append(_round(part, grid, h, damping, act_order))
    whole = Grid(torch.cat([g.scale for g in grids]), torch.cat([g.zero for g in grids]), precision)
    return whole.codes(torch.cat(codes))


def _round(weight: Tensor, grid: Grid, moments: Tensor, damping: float, act_order: bool) -> Tensor:
    """Codes uint8 (experts, out, in). Columns are rows here, (experts, in, out), so that one column is contiguous."""
    experts, out, inp = weight.shape
    levels = grid.precision.levels
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    if act_order:
        order = diagonal.argsort(dim=-1, descending=True, stable=True)
    else:
        order = torch.arange(inp, device=weight.device).expand(experts, inp)
    upper = _factor(moments, order, damping)
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
