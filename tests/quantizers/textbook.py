"""Rounding and GPTQ as a textbook has them: one matrix, float64, one column after the other, an explicit inverse."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mopeq.precision import Precision
from mopeq.qtensor import Codes

Floats = NDArray[np.float64]


def fp16(value: float) -> float:
    return max(float(np.float16(value)), 2.0**-24)


def minmax(weight: Floats, precision: Precision) -> tuple[Floats, Floats]:
    """Scale and zero point (out, groups) of each group, by its definition."""
    out, inp = weight.shape
    groups = precision.group_count(inp)
    top = 2**precision.bits - 1
    scale, zero = np.empty((out, groups)), np.empty((out, groups))
    for row in range(out):
        for g, values in enumerate(weight[row].reshape(groups, -1)):
            low, high = min(0.0, values.min()), max(0.0, values.max())
            if values.min() == values.max():
                step = abs(values[0]) or 1.0
            elif precision.symmetric:
                step = max(-low, high) / (top / 2)
            else:
                step = (high - low) / top
            scale[row, g] = fp16(step)
            zero[row, g] = 2 ** (precision.bits - 1) if precision.symmetric else min(round(-low / scale[row, g]), top)
    return scale, zero


def rounded(value: float, scale: float, zero: float, top: int) -> tuple[int, float]:
    code = min(max(round(value / scale) + zero, 0), top)
    return int(code), (code - zero) * scale


def nearest(weight: Floats, scale: Floats, zero: Floats, precision: Precision) -> NDArray[np.int64]:
    size = weight.shape[1] // scale.shape[1]
    codes = np.empty(weight.shape, dtype=np.int64)
    for (row, column), value in np.ndenumerate(weight):
        g = column // size
        codes[row, column], _ = rounded(value, scale[row, g], zero[row, g], 2**precision.bits - 1)
    return codes


def gptq(
    weight: Floats, moments: Floats, scale: Floats, zero: Floats, precision: Precision, damping: float, act_order: bool
) -> NDArray[np.int64]:
    """Optimal brain quantization in a fixed order, the inverse Hessian reduced column by column."""
    weight, inp = weight.copy(), weight.shape[1]
    size = inp // scale.shape[1]
    diagonal = np.diag(moments)
    inverse = np.linalg.inv(moments + damping * diagonal.mean() * np.eye(inp))
    order = sorted(range(inp), key=lambda i: -diagonal[i]) if act_order else list(range(inp))
    codes = np.empty(weight.shape, dtype=np.int64)
    for column in order:
        s, z = scale[:, column // size], zero[:, column // size]
        codes[:, column] = np.clip(np.round(weight[:, column] / s) + z, 0, 2**precision.bits - 1)
        error = weight[:, column] - (codes[:, column] - z) * s
        weight -= np.outer(error / inverse[column, column], inverse[column])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1.0  # done: its row and column are zero from here on
    return codes


def grid_of(codes: Codes) -> tuple[Floats, Floats]:
    """Scale and zero point (out, groups) that a quantizer chose for one matrix."""
    scale = codes.scales.double().numpy()
    half = np.full(scale.shape, 2.0 ** (codes.precision.bits - 1))
    return scale, half if codes.zeros is None else codes.zeros.double().numpy()


def values(codes: NDArray[np.int64], scale: Floats, zero: Floats) -> Floats:
    size = codes.shape[1] // scale.shape[1]
    return (codes - zero.repeat(size, 1)) * scale.repeat(size, 1)


def weights(experts: int, out: int, inp: int, seed: int = 0) -> Tensor:
    """Heavy-tailed float32 weights whose experts differ in size."""
    g = torch.Generator().manual_seed(seed)
    plain = torch.randn(experts, out, inp, generator=g)
    size = torch.rand(experts, 1, 1, generator=g) * 0.05 + 0.01
    return plain * (1 + 0.3 * plain.square()) * size


def inputs(experts: int, tokens: int, inp: int, seed: int = 0) -> Tensor:
    """Correlated inputs (experts, tokens, in) with a few large channels."""
    g = torch.Generator().manual_seed(seed + 1)
    mix = torch.randn(inp, inp, generator=g) / inp**0.5 + 0.5 * torch.eye(inp)
    channel = torch.exp(torch.randn(inp, generator=g))
    return (torch.randn(experts, tokens, inp, generator=g) @ mix) * channel


def moments_of(x: Tensor) -> Tensor:
    return x.transpose(1, 2) @ x
