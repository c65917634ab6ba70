"""The reference kernel: dequantize, then an ordinary matrix product. Every other kernel is tested against it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from mopeq.kernels.layout import PackedGroup
from mopeq.qtensor import QTensor, dequantize

__all__ = ["grouped_linear", "linear"]

ROW_BLOCK = 1 << 23
"""Weights that are dequantized at a time, so that a large matrix never exists densely."""


def linear(x: Tensor, weight: QTensor) -> Tensor:
    """``x (..., in)`` times a packed matrix (out, in): ``(..., out)`` in ``x``'s type.

    Weights are dequantized in float32, rounded once to ``x``'s type, and multiplied as ``torch.nn.functional.linear``
    does. ``x`` gets gradients; codes have none.
    """
    out, inp = weight.shape
    rows = max(8, ROW_BLOCK // max(inp, 1) // 8 * 8)
    blocks = [_product(x, _rows(weight, i, min(i + rows, out))) for i in range(0, out, rows)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)


def _product(x: Tensor, weight: QTensor) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        return cast(Tensor, _Product.apply(x, weight))  # type: ignore[no-untyped-call]
    return dense_linear(x, dequantize(weight, x.dtype))


class _Product(torch.autograd.Function):
    """A product that dequantizes again for its gradient: kept dense until then, weights would fill the memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QTensor) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        return dense_linear(x, dequantize(weight, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return (gradient @ dequantize(ctx.weight, gradient.dtype)).to(ctx.dtype), None


def _rows(q: QTensor, begin: int, end: int) -> QTensor:
    """Rows ``begin`` to ``end`` as views; both are multiples of 8, or the end."""
    if (begin, end) == (0, q.shape[0]):
        return q
    bits = q.precision.bits
    zeros = None if q.zeros is None else q.zeros[:, begin * bits // 8 : end * bits // 8]
    return QTensor(q.qweight[begin:end], q.scales[begin:end], zeros, (end - begin, q.shape[1]), q.precision)


def grouped_linear(x: Tensor, packed: PackedGroup, offsets: Tensor) -> Tensor:
    """Each expert's rows of ``x`` times its matrices, as :mod:`mopeq.kernels` says; gate's outputs, then up's."""
    result = x.new_zeros(x.shape[0], packed.out_features)
    bounds = offsets.tolist()
    for expert in range(packed.experts):
        begin, end = bounds[expert], bounds[expert + 1]
        if begin < end:
            column = 0
            for matrix in packed.matrices(expert):
                result[begin:end, column : column + matrix.shape[0]] = linear(x[begin:end], matrix)
                column += matrix.shape[0]
    return result
