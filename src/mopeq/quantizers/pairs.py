"""The codebook: two weights at a time become the one of 16 points of a plane (``qtensor.PAIRS``) that costs least.

Rounding with compensation is GPTQ's (arXiv 2210.17323), two columns at a time, as in GPTVQ (van Baalen and others,
arXiv 2402.15319): the error (d0, d1) of two neighbours in the order costs ``|(d0, d1) V|^2`` with V the inverse of
their block of the factor, the nearest point is sought in that metric, and later columns make up for ``(d0, d1) V``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mopeq.precision import Precision
from mopeq.qtensor import PAIRS, Codes
from mopeq.quantizers.grid import fp16, minmax

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


def compensated(weight: Tensor, precision: Precision, importance: Tensor, order: Tensor, upper: Tensor) -> Codes:
    """Codes by GPTQ; the last three arguments are the fields of :class:`~mopeq.quantizers.gptq.Factored`.

    Pairs come in the order in which the first of their columns does in ``order``.
    """
    scale, _ = _searched(weight, precision, importance)
    scale = fp16(scale * ROOM)
    experts, out, inp = weight.shape
    pairs, columns, factor = _by_pairs(order, upper)
    group = (columns[:, ::2] // (inp // scale.shape[-1])).unsqueeze(-1)
    work = weight.transpose(1, 2).gather(1, columns.unsqueeze(-1).expand(-1, -1, out))
    codes = torch.empty(experts, inp // 2, out, dtype=torch.uint8, device=weight.device)
    scales = scale.transpose(1, 2).contiguous()
    points = torch.tensor(PAIRS, dtype=torch.float32, device=weight.device)
    a, b, c = factor[:, 0::2, 0::2], factor[:, 0::2, 1::2], factor[:, 1::2, 1::2]
    a, b, c = (block.diagonal(dim1=1, dim2=2).unsqueeze(-1) for block in (a, b, c))  # (experts, pairs, 1) each
    first = points[:, 0] / a
    moved = torch.stack([first, (points[:, 1] - b * first) / c], -1)  # (experts, pairs, 16, 2): points times V
    bias = moved.square().sum(-1, keepdim=True).mul_(-0.5)

    def solve(start: int, stop: int) -> None:
        """Round columns start..stop-1; their rows of ``work`` become the errors that later columns compensate."""
        if stop - start > LEAF:
            middle = start + (stop - start + LEAF) // (2 * LEAF) * LEAF
            solve(start, middle)
            work[:, middle:stop].baddbmm_(factor[:, start:middle, middle:stop].mT, work[:, start:middle], alpha=-1)
            solve(middle, stop)
            return
        for j in range(start, stop, 2):
            p, two = j // 2, work[:, j : j + 2]
            s = scales.gather(1, group[:, p : p + 1].expand(-1, -1, out))
            two[:, 0].div_(a[:, p])
            two[:, 1].sub_(two[:, 0] * b[:, p]).div_(c[:, p])
            best = torch.baddbmm(bias[:, p], moved[:, p], two / s).argmax(1)  # of (experts, 16, out)
            codes[:, p] = best
            chosen = moved[:, p].gather(1, best.unsqueeze(-1).expand(-1, -1, 2)).mT
            two.sub_(chosen * s)
            work[:, j + 2 : stop].baddbmm_(factor[:, j : j + 2, j + 2 : stop].mT, two, alpha=-1)

    solve(0, inp)
    placed = torch.empty_like(codes).scatter_(1, pairs.unsqueeze(-1).expand(-1, -1, out), codes)
    return Codes(placed.mT.contiguous(), scale.to(torch.float16), None, precision)


def _by_pairs(order: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (experts, in/2) in their order, their columns (experts, in), and the upper triangular factor in that order.

    With U^T U the inverse of the moments, so is the product of U with columns exchanged; its QR factor is triangular.
    """
    inp = order.shape[-1]
    code = torch.arange(inp // 2, device=order.device)
    low = code // 4 * 8 + code % 4
    rank = order.argsort(-1)
    pairs = torch.minimum(rank[:, low], rank[:, low + 4]).argsort(-1)
    columns = torch.stack([low[pairs], low[pairs] + 4], -1).flatten(1)
    exchanged = upper.gather(2, rank.gather(1, columns).unsqueeze(1).expand(-1, inp, -1))
    triangle: Tensor = torch.linalg.qr(exchanged, mode="r").R
    return pairs, columns, triangle * triangle.diagonal(dim1=1, dim2=2).sign().unsqueeze(-1)


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
