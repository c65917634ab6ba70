"""SignRound: rounding and clipping learned by the sign of a gradient, as AutoRound does.

Cheng, Zhang, Shen, Cai, He, Lv, Liu, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of
LLMs", arXiv 2309.05516. For a group of weights w, with V within [-1/2, 1/2] for each weight and a, b within [0, 1] for
each group,

    s = (b max(w, 0) - a min(w, 0)) / (levels - 1)        z = round(-a min(w, 0) / s)
    q = clip(round(w / s + V) + z, 0, levels - 1)         w~ = s (q - z)

V begins at 0, a and b at 1. Each of the iterations moves every one of them by the learning rate against the sign of its
gradient; roundings pass gradients on as they come. The rate falls linearly from 1 / iterations to 0, and the best
iterate counts. The loss here is the squared error of one matrix's outputs over all its calibration inputs, ``tr(D H
D^T)`` with D = w - w~ and the moments H; :mod:`mopeq.learned` learns the matrices of an expert together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mopeq.errors import DataError
from mopeq.precision import Precision
from mopeq.qtensor import Codes
from mopeq.quantizers.grid import TINY, Grid, minmax
from mopeq.quantizers.turned import for_rotated

__all__ = ["ITERATIONS", "Rounding", "signround"]

ITERATIONS = 200
CHUNK = 1 << 24
"""Floats of weights and moments worked on at a time; some ten such buffers live."""


@for_rotated
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
    rounding = Rounding(weight, precision)
    least = weight.new_full((len(weight),), torch.inf)
    best = [parameter.detach().clone() for parameter in rounding.parameters()]
    for turn in range(iterations + 1):
        with torch.enable_grad():
            made = rounding.weight()
        error = made.detach() - weight
        slope = error @ h
        loss = (slope * error).sum((1, 2))
        better = loss < least
        least = torch.where(better, loss, least)
        for kept, parameter in zip(best, rounding.parameters(), strict=True):
            kept[better] = parameter.detach()[better]
        if turn < iterations:
            gradients = torch.autograd.grad(made, rounding.parameters(), slope)
            rounding.step(gradients, (1 - turn / iterations) / iterations)
    rounding.v, rounding.ends = best
    scale, zero, codes = rounding.quantized()
    return scale.squeeze(-1), zero.squeeze(-1), codes.reshape(weight.shape)


class Rounding:
    """Roundings and clippings of a batch of matrices (experts, out, in), to be learned, beginning with min-max grids.

    ``v`` (experts, out, groups, size) moves weights by at most half a step, ``ends`` (experts, 2, out, groups, 1) are
    the shares of a group's least and largest weight that its grid reaches to.
    """

    def __init__(self, weight: Tensor, precision: Precision) -> None:
        groups = precision.group_count(weight.shape[-1])
        self.precision, self.shape = precision, weight.shape
        self.w = weight.reshape(*weight.shape[:-1], groups, -1)
        low, high = self.w.amin(-1, keepdim=True).clamp_max(0), self.w.amax(-1, keepdim=True).clamp_min(0)
        self.reach = torch.stack((low, high), 1)
        self.v = torch.zeros_like(self.w).requires_grad_()
        self.ends = torch.ones_like(self.reach).requires_grad_()

    def parameters(self) -> tuple[Tensor, Tensor]:
        """What is learned."""
        return self.v, self.ends

    def step(self, gradients: Sequence[Tensor], rate: float) -> None:
        """Move everything by ``rate`` against the sign of its gradient."""
        v, ends = gradients
        self.v = self.v.detach().sub_(v.sign(), alpha=rate).clamp_(-0.5, 0.5).requires_grad_()
        self.ends = self.ends.detach().sub_(ends.sign(), alpha=rate).clamp_(0, 1).requires_grad_()

    def weight(self) -> Tensor:
        """The weights (experts, out, in) that the codes stand for; roundings pass gradients on as they come."""
        scale, zero, codes = self.quantized()
        return ((codes - zero) * scale).reshape(self.shape)

    def codes(self) -> Codes:
        """The codes."""
        with torch.no_grad():
            scale, zero, codes = self.quantized()
        return Grid(scale.squeeze(-1), zero.squeeze(-1), self.precision).codes(codes.reshape(self.shape))

    def quantized(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scales and zero points (experts, out, groups, 1) and codes (experts, out, groups, size), as floats."""
        top, symmetric = self.precision.levels - 1, self.precision.symmetric
        low, high = (self.ends * self.reach).unbind(1)
        reach = 2 * torch.maximum(high, -low) if symmetric else high - low
        scale = torch.where(reach > 0, reach / top, 1.0).to(torch.float16).to(self.w.dtype).clamp_min(TINY)
        half = float(self.precision.levels // 2)
        zero = torch.full_like(scale, half) if symmetric else _round(-low / scale).clamp(0, top)
        return scale, zero, (_round(self.w / scale + self.v) + zero).clamp(0, top)


def _round(x: Tensor) -> Tensor:
    """To the nearest integer; gradients pass as they come."""
    return x + (x.round() - x).detach()
