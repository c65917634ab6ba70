"""GPTQ: rounding column by column, each column's error compensated by the columns not yet rounded.

Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323. For one row w and input moments H it reduces ``(w - q) H (w - q)^T``.

The paper takes rows of the Cholesky factor of the inverse of H. Here no inverse is made: with H = R D R^T, R upper
triangular with a diagonal of ones and D diagonal, the sum is ``sum_j D_jj (e_j + sum_{i<j} e_i R_ij)^2`` of e = w - q,
so column j is rounded to the grid point nearest to ``w_j + sum_{i<j} e_i R_ij``. These are the same points (Chen et
al., "The Geometry of LLM Quantization: GPTQ as Babai's Nearest Plane Algorithm", arXiv 2507.18553).
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
from mopeq.quantizers.grid import Grid, bounds, columns, minmax, searched, steps
from mopeq.quantizers.rtn import importance
from mopeq.quantizers.turned import for_rotated

__all__ = ["Factored", "factored", "gptq"]

FACTORS = tuple(1 - 0.025 * i for i in range(7))
"""Multiples of the min-max scale from which grids are chosen. None below 0.85: what one column gives up the others take
on, and need room at the ends of the grid that plain rounding does not."""
DAMPING = 0.2
"""Share of the mean diagonal that is added to the diagonal of the moments."""
LEAF = 16
"""Columns that are rounded one after the other before a matrix product takes over."""
BLOCK = 256
"""Columns whose errors are kept apart until the columns after them are in turn."""
CHUNK = 1 << 28
"""Floats of weights and moments worked on at a time (1 GiB, about three such buffers live)."""


@dataclass(frozen=True)
class Factored:
    """What GPTQ needs of moments (experts, in, in), whatever the precision.

    importance: float32 (experts, in), of the grid search. order: int64 (experts, in), in which columns are rounded.
    upper: float32 (experts, in, in), R of the damped moments R D R^T in that order: upper triangular, ones on the
    diagonal. pivots: float32 (experts, in), the diagonal of D.
    """

    importance: Tensor
    order: Tensor
    upper: Tensor
    pivots: Tensor

    def __getitem__(self, part: slice | list[int]) -> Factored:
        """Some of the matrices."""
        return Factored(self.importance[part], self.order[part], self.upper[part], self.pivots[part])


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
    return Factored(importance(moments), order, *_factor(moments, order, damping))


@for_rotated
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
            made.append(
                pairs.compensated(part, precision, f.importance, f.order, f.upper * f.pivots.sqrt().unsqueeze(1))
            )
            continue
        if factors:
            grid = searched(part, precision, f.importance, factors=factors, refits=0)
        else:
            grid = minmax(part, precision)
        made.append(grid.codes(_round(part, grid, f)))
    zeros = [c.zeros for c in made if c.zeros is not None]
    return Codes(
        torch.cat([c.codes for c in made]), torch.cat([c.scales for c in made]), torch.cat(zeros) if zeros else None,
        precision,
    )  # fmt: skip


def _round(weight: Tensor, grid: Grid, factors: Factored) -> Tensor:
    """Codes uint8 (experts, out, in). Columns are rows here, (experts, in, out), so that one column is contiguous."""
    experts, out, inp = weight.shape
    levels, groups = grid.precision.levels, grid.scale.shape[-1]
    order, upper = factors.order, factors.upper
    first = torch.arange(experts, device=weight.device)[:, None]
    place = (first * inp + order).flatten()  # of each column of all experts
    group = first * groups + order // (inp // groups)
    scales, zeros = columns(grid.scale).view(-1, out), columns(grid.zero).view(-1, out)
    work = columns(weight).view(-1, out).index_select(0, place).view(experts, inp, out)
    shift = work.new_empty(experts, min(inp, BLOCK), out)  # by which the columns of one block are moved
    codes = torch.empty(work.shape, dtype=torch.uint8, device=weight.device)

    def move(moved: Tensor, by: slice, at: slice) -> None:
        moved.baddbmm_(upper[:, by, at].transpose(1, 2), work[:, by])

    def solve(start: int, stop: int, block: int) -> None:
        """Round columns start..stop-1: their rows of ``work`` become errors."""
        if stop - start > LEAF:
            middle = start + (stop - start + LEAF) // (2 * LEAF) * LEAF
            solve(start, middle, block)
            move(shift[:, middle - block : stop - block], slice(start, middle), slice(middle, stop))
            solve(middle, stop, block)
            return
        index = group[:, start:stop].flatten()
        scale, zero = (part.index_select(0, index).view(experts, stop - start, out) for part in (scales, zeros))
        least, most = bounds(zero, levels)
        found = shift[:, start - block : stop - block].add_(work[:, start:stop])
        for i, j in enumerate(range(start, stop)):
            k = steps(found[:, i], scale[:, i], least[:, i], most[:, i], out=found[:, i])
            error = work[:, j].addcmul_(k, scale[:, i], value=-1)
            found[:, i + 1 :].addcmul_(upper[:, j, j + 1 : stop, None], error[:, None])
        codes[:, start:stop] = found.add_(zero)

    for start in range(0, inp, BLOCK):
        stop = min(inp, start + BLOCK)
        move(shift[:, : stop - start].zero_(), slice(start), slice(start, stop))
        solve(start, stop, start)
    placed = torch.empty_like(codes).view(-1, out).index_copy_(0, place, codes.view(-1, out)).view_as(codes)
    return columns(placed)


def _factor(moments: Tensor, order: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """R (experts, in, in) and the diagonal of D (experts, in) of the damped moments in the given order.

    With the columns reversed, H = L L^T; L with its columns divided by its diagonal, reversed back, is R, and the
    squares of that diagonal are D's.
    """
    h = torch.empty_like(moments)
    for into, matrix, at in zip(h, moments, order.flip(-1), strict=True):
        torch.index_select(matrix.index_select(0, at), 1, at, out=into)
    mean = h.diagonal(dim1=-2, dim2=-1).mean(-1)
    seen = mean > 0
    h.div_(torch.where(seen, mean, 1.0)[:, None, None])
    h.diagonal(dim1=-2, dim2=-1).add_(torch.where(seen, damping, 1.0)[:, None])
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(h)
    for e in (info > 0).nonzero().flatten().tolist():
        lower[e] = _factor_slowly(h[e].double(), damping).float()
    del h
    root = lower.diagonal(dim1=-2, dim2=-1).clone()
    lower.div_(root.unsqueeze(1))
    return lower.flip(1, 2), root.square().flip(1)


def _factor_slowly(h: Tensor, damping: float) -> Tensor:
    """The Cholesky factor of one matrix in float64, with ten times more damping until it exists."""
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    more = 0.0
    while more <= 1.0:
        lower, info = torch.linalg.cholesky_ex(h + more * eye)
        if not int(info):
            made: Tensor = lower
            return made
        more = 10 * max(more, damping)
    raise DataError(
        f"moments are not positive semidefinite with damping {more / 10:g}; expected sums of x x^T; calibrate again"
    )
