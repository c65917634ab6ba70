"""What codes do to a token that they were fitted to, as if they had not been.

GPTQ leaves errors D = W - Q with D R = E, where R is that of its damped moments ``H = sum_t n_t x_t x_t^T = R P R^T``
(gptq.py) and E are the roundings of the columns, each after the others had been compensated. So a token's output
changes by ``D x = E u`` with ``u = R^-1 x``: column j counts with what is left of x_j by a ridge regression on the
columns rounded after it, and on tokens that the regression was fitted to too little is left. Without token t, and with
the same roundings, u_j is larger by ``1 / (1 - h_j)``, where

    h_j = n_t sum_{k>j} u_k^2 / P_kk

is the token's leverage (PRESS: Allen, "The Relationship between Variable Selection and Data Augmentation and a Method
for Prediction", Technometrics 16, 1974). Then ``D R diag(1 / (1 - h)) R^-1 x`` is the change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mopeq.quantizers.gptq import Factored

__all__ = ["unfitted"]

LEAST = 1e-5
"""Least 1 - h: what rounding in float32 leaves exact."""


def unfitted(factors: Factored, matrix: int, scale: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """Inputs at which the codes of a matrix do what those would that were fitted without each, float32 (n, in).

    factors: of the moments that the codes were fitted to. matrix: which of the batch. scale: the mean diagonal of its
    moments. x: (n, in), inputs that are in these moments. counts: (n,), what each counts there.
    """
    order, upper = factors.order[matrix], factors.upper[matrix]
    u = torch.linalg.solve_triangular(upper.mT, x[:, order], upper=False, left=False, unitriangular=True)  # (n, in)
    each = u.square().mul_(counts[:, None]).div_(factors.pivots[matrix] * scale)
    rest = (1 - each.sum(-1, keepdim=True)).add(each.cumsum(-1)).clamp_min_(LEAST)  # 1 - h
    return torch.empty_like(x).index_copy_(1, order, u.div_(rest) @ upper.T)
