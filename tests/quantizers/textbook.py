"""Rounding and GPTQ as a textbook has them: one matrix, float64, one column after the other, an explicit inverse."""

from __future__ import annotations

import math
from typing import Any

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


def hqq(weight: Floats, scale: Floats, zero: Floats, precision: Precision, turns: int) -> Floats:
    """Zero points (out, groups) of HQQ, group after group."""
    found, size, top = zero.copy(), weight.shape[1] // scale.shape[1], 2**precision.bits - 1
    for row, g in np.ndindex(*scale.shape):
        w, s, z, beta = weight[row, g * size : (g + 1) * size], scale[row, g], zero[row, g], 10.0
        for _ in range(turns):
            total = 0.0
            for value in w:
                q = min(max(round(value / s + z), 0), top)
                e = value - s * (q - z)
                sparse = 0.0 if e == 0 else math.copysign(max(abs(e) - abs(e) ** -0.3 / beta, 0.0), e)
                total += q - (value - sparse) / s
            z, beta = total / size, beta * 1.01
        found[row, g] = z
    return found


def signround(weight: Floats, h: Floats, precision: Precision, turns: int) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Scale, zero point (out, groups, 1) and codes of SignRound, with gradients derived by hand."""
    out, inp = weight.shape
    w = weight.reshape(out, precision.group_count(inp), -1)
    top, half = 2**precision.bits - 1, 2 ** (precision.bits - 1)
    least, most = np.minimum(w.min(-1, keepdims=True), 0), np.maximum(w.max(-1, keepdims=True), 0)
    v, a, b = np.zeros_like(w), np.ones_like(least), np.ones_like(least)
    best: tuple[float, Any] = (np.inf, None)
    for turn in range(turns + 1):
        low, high = a * least, b * most
        reach = 2 * np.maximum(high, -low) if precision.symmetric else high - low
        s = np.float16(reach / top).astype(np.float64)
        raw = np.full_like(s, half) if precision.symmetric else np.round(-low / s)
        z = np.clip(raw, 0, top)
        k = np.round(w / s + v) + z
        q = np.clip(k, 0, top)
        error = ((q - z) * s - w).reshape(out, inp)
        loss = float(((error @ h) * error).sum())
        if loss < best[0]:
            best = loss, (s, z, q.reshape(out, inp).astype(np.int64))
        if turn == turns:
            break
        slope = (error @ h).reshape(w.shape)
        inside = (k >= 0) & (k <= top)
        z_by_s, z_by_low = (0.0, 0.0) if precision.symmetric else (low / s**2, -1 / s)
        by_s = (q - z) + s * (inside * (z_by_s - w / s**2) - z_by_s)
        by_low = s * (inside * z_by_low - z_by_low)
        if precision.symmetric:
            s_by_a, s_by_b = np.where(-low > high, -2 * least, 0) / top, np.where(high > -low, 2 * most, 0) / top
        else:
            s_by_a, s_by_b = -least / top, most / top
        rate = (1 - turn / turns) / turns
        gradient_a = (slope * (by_s * s_by_a + by_low * least)).sum(-1, keepdims=True)
        gradient_b = (slope * by_s * s_by_b).sum(-1, keepdims=True)
        v = np.clip(v - rate * np.sign(slope * s * inside), -0.5, 0.5)
        a, b = np.clip(a - rate * np.sign(gradient_a), 0, 1), np.clip(b - rate * np.sign(gradient_b), 0, 1)
    found: tuple[Floats, Floats, NDArray[np.int64]] = best[1]
    return found


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
