"""The codebook: two weights at a time become the one of 16 points of a plane (``qtensor.PAIRS``) that costs least.

Rounding with compensation is GPTQ's, two columns at a time, as in GPTVQ (van Baalen and others, arXiv 2402.15319). With
moments A A^T, A upper triangular, the error e of a row costs ``|e A|^2``. Where e is known up to a pair of columns, the
pair's two terms are ``(w - q) B + s``, B the pair's block of A and s what the columns before give: the point q nearest
to the pair's weights w in that metric is taken.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mopeq.precision import Precision
from mopeq.qtensor import PAIRS, Codes
from mopeq.quantizers.grid import columns, fp16, minmax

__all__ = ["compensated", "nearest"]

FACTORS = (0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75)
"""Multiples of the scale that gives the points the weights' root mean square: those tried for plain rounding."""
ROOM = 1.2
"""By which compensated rounding widens the best scale of plain rounding: what one column gives up the others take on,
and points beyond which weights are cut off cost more than coarser ones (docs/results.md)."""
LEAF = 16
"""Columns that are rounded, two by two, before a matrix product takes over."""


def nearest(weight: Tensor, precision: Precision, importance: Tensor | None = None) -> Codes:
    """Codes of the nearest points, at the scales of least squared error among ``FACTORS``.

    weight: float32 (experts, out, in). importance: float32 (experts, in), weights of the squared errors, at any scale.
    """
    scale, codes = _searched(weight, precision, importance)
    return Codes(codes, scale.to(torch.float16), None, precision)


def compensated(weight: Tensor, precision: Precision, importance: Tensor, order: Tensor, root: Tensor) -> Codes:
    """Codes by GPTQ.

    weight: float32 (experts, out, in). importance: float32 (experts, in), of the search of scales. order: int64
    (experts, in). root: float32 (experts, in, in), upper triangular, A of the damped moments A A^T in that order.
    Pairs come in the order in which the first of their columns does.
    """
    scale, _ = _searched(weight, precision, importance)
    scale = fp16(scale * ROOM)
    experts, out, inp = weight.shape
    pairs, at, factor = _by_pairs(order, root)
    group = (at[:, ::2] // (inp // scale.shape[-1])).unsqueeze(-1)
    scales = columns(scale)
    work = columns(weight).gather(1, at.unsqueeze(-1).expand(-1, -1, out))
    shift = torch.zeros_like(work)  # by which errors so far move what is to be rounded, times A
    codes = torch.empty(experts, inp // 2, out, dtype=torch.uint8, device=weight.device)
    points = torch.tensor(PAIRS, dtype=torch.float32, device=weight.device)
    blocks = factor.view(experts, inp // 2, 2, inp // 2, 2).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    moved = points @ blocks  # (experts, pairs, 16, 2)
    bias = moved.square().sum(-1, keepdim=True).mul_(-0.5)

    def solve(start: int, stop: int) -> None:
        """Round columns start..stop-1: their rows of ``work`` become errors."""
        if stop - start > LEAF:
            middle = start + (stop - start + LEAF) // (2 * LEAF) * LEAF
            solve(start, middle)
            shift[:, middle:stop].baddbmm_(factor[:, start:middle, middle:stop].mT, work[:, start:middle])
            solve(middle, stop)
            return
        for j in range(start, stop, 2):
            p, two = j // 2, work[:, j : j + 2]
            s = scales.gather(1, group[:, p : p + 1].expand(-1, -1, out))
            target = torch.baddbmm(shift[:, j : j + 2], blocks[:, p].mT, two).div_(s)
            best = torch.baddbmm(bias[:, p], moved[:, p], target).argmax(1)  # of (experts, 16, out)
            codes[:, p] = best
            two.sub_(points[best].mT * s)
            shift[:, j + 2 : stop].baddbmm_(factor[:, j : j + 2, j + 2 : stop].mT, two)

    solve(0, inp)
    placed = torch.empty_like(codes).scatter_(1, pairs.unsqueeze(-1).expand(-1, -1, out), codes)
    return Codes(columns(placed), scale.to(torch.float16), None, precision)


def _by_pairs(order: Tensor, root: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (experts, in/2) in their order, their columns (experts, in), and the triangular factor in that order.

    A with rows exchanged is still a root of the moments; its RQ factor is triangular too.
    """
    inp = order.shape[-1]
    code = torch.arange(inp // 2, device=order.device)
    low = code // 4 * 8 + code % 4
    rank = order.argsort(-1)
    pairs = torch.minimum(rank[:, low], rank[:, low + 4]).argsort(-1)
    at = torch.stack([low[pairs], low[pairs] + 4], -1).flatten(1)
    exchanged = root.gather(1, rank.gather(1, at).unsqueeze(-1).expand(-1, -1, inp))
    triangle: Tensor = torch.linalg.qr(exchanged.flip(1).mT, mode="r").R.mT.flip(1, 2)
    return pairs, at, triangle * triangle.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)


def _searched(weight: Tensor, precision: Precision, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scales (experts, out, groups) of least error in plain rounding, and its codes (experts, out, in/2)."""
    minmax(weight, replace(precision, codebook=False))  # refuses what cannot be stored
    experts, out, inp = weight.shape
    groups = precision.group_count(inp)
    points = torch.tensor(PAIRS, dtype=torch.float32, device=weight.device)
    table = torch.cat([-2 * points, points.square()], 1).T  # of (h x, h x', h, h'): error of each point, less h x^2
    scale = torch.empty(experts, out, groups, device=weight.device)
    codes = torch.empty(experts, out, inp // 2, dtype=torch.uint8, device=weight.device)
    for e in range(experts):
        x = weight[e].view(out, groups, -1, 2, 4).mT.flatten(2, 3)  # (out, groups, pairs, 2)
        h = torch.ones(inp, device=weight.device) if importance is None else importance[e].float()
        h = h.view(groups, -1, 2, 4).mT.flatten(1, 2)
        square = (h * x.square()).sum((2, 3))
        base = (square / h.sum((1, 2)) / points.square().mean()).sqrt()
        least = torch.full_like(base, torch.inf)
        for factor in FACTORS:
            s = fp16(torch.where(base > 0, base * factor, 1.0))
            one = s[..., None, None]
            cost, code = (torch.cat([h * x / one, h.expand_as(x)], -1) @ table).min(-1)
            error = cost.sum(-1) * s.square()
            better = error < least
            least = torch.where(better, error, least)
            scale[e] = torch.where(better, s, scale[e])
            codes[e] = torch.where(better.unsqueeze(-1), code, codes[e].view(out, groups, -1)).flatten(1)
    return scale, codes
