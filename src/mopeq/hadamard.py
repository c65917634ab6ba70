"""The rotation of inputs behind precisions such as ``2g128h``: signs, then a Walsh-Hadamard matrix.

Large weights and large inputs of a row are spread over all of it, and what is left fits a grid better (incoherence:
Chee et al., QuIP, arXiv 2307.13304; Ashkboos et al., QuaRot, arXiv 2404.00456). A row of n inputs is cut into runs of
b, the largest power of two that divides n. With D the diagonal of signs, +1 and -1, and H the b x b matrix of
``(-1)^popcount(i & j) / sqrt(b)``, a run x becomes R x with R = H D, and ``W x = (W R^T)(R x)``. Signs are the
Rudin-Shapiro sequence, ``(-1)^popcount(i & (i >> 1))``, whose products with every row of H add up to little: a constant
row of inputs is spread evenly, and nothing has to be stored. The compiled kernel has the same (csrc/loops.inc).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["restored", "rotated", "rotation", "run_length", "signs"]


def run_length(inputs: int) -> int:
    """Numbers in a run of a row of so many inputs."""
    return inputs & -inputs


@cache
def signs(size: int) -> Tensor:
    """The diagonal of D, float32 (size,)."""
    return torch.tensor([-1.0 if (i & i >> 1).bit_count() % 2 else 1.0 for i in range(size)])


def rotation(size: int) -> Tensor:
    """R itself, float32 (size, size): the slow twin of :func:`rotated`."""
    rows = [[-1.0 if (i & j).bit_count() % 2 else 1.0 for j in range(size)] for i in range(size)]
    found: Tensor = torch.tensor(rows) * size**-0.5 * signs(size)
    return found


def rotated(x: Tensor) -> Tensor:
    """R x of every row, the last axis of x (..., n), float32: weights give W R^T."""
    runs = _runs(x)
    return _walsh(runs * signs(runs.shape[-1]).to(x)).flatten(-2)


def restored(x: Tensor) -> Tensor:
    """R^T x of every row: the inverse."""
    runs = _runs(x)
    return (_walsh(runs) * signs(runs.shape[-1]).to(x)).flatten(-2)


def _runs(x: Tensor) -> Tensor:
    """Rows (..., n) as runs (..., n/b, b)."""
    return x.reshape(*x.shape[:-1], -1, run_length(x.shape[-1]))


def _walsh(runs: Tensor) -> Tensor:
    """H times each run (..., b), as the Kronecker product of two smaller ones."""
    size = runs.shape[-1]
    low = 1 << (size.bit_length() // 2)
    cells = runs.reshape(*runs.shape[:-1], size // low, low)
    made: Tensor = _matrix(size // low).to(runs) @ (cells @ _matrix(low).to(runs))
    return made.flatten(-2)


@cache
def _matrix(size: int) -> Tensor:
    """H, float32 (size, size)."""
    h = torch.ones(1, 1)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    found: Tensor = h * size**-0.5
    return found
