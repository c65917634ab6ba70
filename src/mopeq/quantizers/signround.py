"""SignRound: rounding and clipping learned by the sign of a gradient, as AutoRound does.

Cheng, Zhang, Shen, Cai, He, Lv, Liu, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of
LLMs", arXiv 2309.05516. For a group of weights w, with V within [-1/2, 1/2] for each weight and a, b within [0, 1] for
each group,

    s = (b max(w, 0) - a min(w, 0)) / (levels - 1)        z = round(-a min(w, 0) / s)
    q = clip(round(w / s + V) + z, 0, levels - 1)         w~ = s (q - z)

V begins at 0, a and b at 1. Each of the iterations moves every one of them by the learning rate against the sign of its
gradient; roundings pass gradients on as they come. The rate falls linearly from 1 / iterations to 0, and the best
iterate counts. The loss is the squared error of a matrix's outputs over all its calibration inputs, ``tr(D H D^T)``
with D = w - w~ and the moments H: what AutoRound samples eight sequences at a time, in closed form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mopeq.errors import DataError
from mopeq.precision import Precision
from mopeq.qtensor import Codes
from mopeq.quantizers.grid import TINY, Grid, minmax

__all__ = ["signround"]

ITERATIONS = 200
CHUNK = 1 << 24
"""Floats of weights and moments worked on at a time; some ten such buffers live."""


def signround(
    weight: Tensor,
    precision: Precision,
    moments: Tensor | None = None,
    *,
    iterations: int = ITERATIONS,
    damping: float = 0.0,
) -> Codes:
    """SignRound codes of a batch of matrices.

    weight: float32 (experts, out, in). moments: (experts, in, in), sums of x x^T over an expert's inputs, at any scale;
    an expert with none gets the identity. ``damping`` times the mean of the diagonal is added to it. The loss of an
    expert never exceeds that of rounding to the nearest on min-max grids.

    Raises :class:`DataError` without moments, or where they are not finite; :class:`ModelError` as :func:`minmax`.
    """
    if moments is None:
        raise DataError(
            "signround needs the moments of calibration inputs, found none; give calibration data, or use rtn-mse"
        )
    experts, out, inp = weight.shape
    if tuple(moments.shape) != (experts, inp, inp):
        raise ValueError(f"moments {tuple(moments.shape)}; expected {(experts, inp, inp)}")
    bad = (~torch.isfinite(moments.sum((1, 2)))).nonzero().flatten().tolist()
    if bad:
        raise DataError(f"moments of matrices {bad[:8]} of the batch are not finite; calibrate in float32 or bfloat16")
    minmax(weight, precision)  # refuses what cannot be stored
    step = max(1, CHUNK // (inp * (inp + out)))
    parts = [
        _learned(weight[i : i + step], precision, _scaled(moments[i : i + step].float(), damping), iterations)
        for i in range(0, experts, step)
    ]
    scale, zero, codes = (torch.cat(column) for column in zip(*parts, strict=True))
    return Grid(scale, zero, precision).codes(codes)


def _scaled(moments: Tensor, damping: float) -> Tensor:
    """Moments of mean diagonal 1, damped; the identity where there are none."""
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1)
    seen = mean > 0
    made = moments / torch.where(seen, mean, 1.0)[:, None, None]
    made.diagonal(dim1=-2, dim2=-1).add_(torch.where(seen, damping, 1.0)[:, None])
    return made


def _learned(weight: Tensor, precision: Precision, h: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and zero points (experts, out, groups) and codes (experts, out, in) of least loss."""
    experts, out, inp = weight.shape
    groups = precision.group_count(inp)
    w = weight.reshape(experts, out, groups, inp // groups)
    v = torch.zeros_like(w)
    ends = w.new_ones(2, experts, out, groups, 1)
    least = w.new_full((experts,), torch.inf)
    best_v, best_ends = v.clone(), ends.clone()
    for turn in range(iterations + 1):
        v.requires_grad_()
        ends.requires_grad_()
        with torch.enable_grad():
            scale, zero, codes = _quantized(w, v, ends, precision)
            made = ((codes - zero) * scale).reshape(weight.shape)
        error = made.detach() - weight
        slope = error @ h
        loss = (slope * error).sum((1, 2))
        better = loss < least
        least = torch.where(better, loss, least)
        best_v[better], best_ends[:, better] = v.detach()[better], ends.detach()[:, better]
        if turn < iterations:
            gradient_v, gradient_ends = torch.autograd.grad(made, (v, ends), slope)
            rate = (1 - turn / iterations) / iterations
            v = v.detach().sub_(gradient_v.sign_(), alpha=rate).clamp_(-0.5, 0.5)
            ends = ends.detach().sub_(gradient_ends.sign_(), alpha=rate).clamp_(0, 1)
    with torch.no_grad():
        scale, zero, codes = _quantized(w, best_v, best_ends, precision)
    return scale.squeeze(-1), zero.squeeze(-1), codes.reshape(weight.shape)


def _quantized(w: Tensor, v: Tensor, ends: Tensor, precision: Precision) -> tuple[Tensor, Tensor, Tensor]:
    """Scales, zero points and codes, as floats with gradients; w, v (..., groups, size), ends (2, ..., groups, 1)."""
    top = precision.levels - 1
    low, high = ends[0] * w.amin(-1, keepdim=True).clamp_max(0), ends[1] * w.amax(-1, keepdim=True).clamp_min(0)
    reach = 2 * torch.maximum(high, -low) if precision.symmetric else high - low
    scale = torch.where(reach > 0, reach / top, 1.0).to(torch.float16).float().clamp_min(TINY)
    zero = torch.full_like(scale, precision.levels // 2) if precision.symmetric else _round(-low / scale).clamp(0, top)
    return scale, zero, (_round(w / scale + v) + zero).clamp(0, top)


def _round(x: Tensor) -> Tensor:
    """To the nearest integer; gradients pass as they come."""
    return x + (x.round() - x).detach()
