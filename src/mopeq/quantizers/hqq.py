"""HQQ: zero points that make the errors of a group sparse, found without data by half-quadratic splitting.

Badri, Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023 (the method of the package hqq).
For a group w on a grid of scale s, errors e and zero point z are found in turn, each with the other held:

    q = clip(round(w / s + z), 0, levels - 1)      r = s (q - z)
    e = sign(w - r) max(|w - r| - |w - r|^(p - 1) / beta, 0)          the proximal step of the norm |.|^p, p = 0.7
    z = mean(q - (w - e) / s)                      beta grows by 1 % a turn

The scale stays that of the range. The method's z is a float; a packed checkpoint stores a code, so the z found is
rounded to one at the end, and codes are then the nearest ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mopeq.precision import Precision
from mopeq.qtensor import Codes
from mopeq.quantizers.grid import Grid, minmax, nearest
from mopeq.quantizers.turned import for_rotated

__all__ = ["hqq"]

NORM, BETA, GROWTH, TURNS = 0.7, 10.0, 1.01, 20
"""What the package hqq uses."""


@for_rotated
def hqq(weight: Tensor, precision: Precision, moments: Tensor | None = None) -> Codes:
    """HQQ codes. weight: float32 (experts, out, in); ``moments`` is not used.

    A symmetric precision has no zero point to choose: min-max rounding.
    """
    grid = minmax(weight, precision)
    if precision.symmetric:
        return nearest(weight, grid)
    zero = solved(weight, grid).round_().clamp_(0, precision.levels - 1)
    return nearest(weight, Grid(grid.scale, zero, precision))


def solved(weight: Tensor, grid: Grid, turns: int = TURNS) -> Tensor:
    """The zero points (experts, out, groups), floats, after some turns from those of a grid."""
    groups = grid.scale.shape[-1]
    w = weight.reshape(*weight.shape[:2], groups, -1)
    scale, zero = grid.scale.unsqueeze(-1), grid.zero.unsqueeze(-1)
    beta = BETA
    for _ in range(turns):
        codes = (w / scale + zero).round_().clamp_(0, grid.precision.levels - 1)
        error = w - (codes - zero) * scale
        size = error.abs()
        shrunk = error.sign() * (size - size.clamp_min(torch.finfo(size.dtype).tiny).pow(NORM - 1) / beta).clamp_min_(0)
        zero = (codes - (w - shrunk) / scale).mean(-1, keepdim=True)
        beta *= GROWTH
    return zero.squeeze(-1)
