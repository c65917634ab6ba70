"""HQQ against the textbook."""

from __future__ import annotations

import pytest
import torch
from textbook import hqq as textbook_hqq
from textbook import weights

from mopeq.precision import Precision
from mopeq.qtensor import dequantize
from mopeq.quantizers import hqq, rtn
from mopeq.quantizers.grid import Grid, minmax, nearest
from mopeq.quantizers.hqq import solved


@pytest.mark.parametrize("size", [0.01, 1.0, 30.0], ids="weights of {}".format)
@pytest.mark.parametrize("precision", [Precision(2, 32), Precision(3, 64), Precision(4, -1)], ids=str)
def test_zero_points_are_those_of_the_textbook(precision: Precision, size: float) -> None:
    """Small weights have no sparse errors in them, large ones hardly any others."""
    weight = weights(2, 6, 64, seed=precision.bits)
    weight = weight / weight.abs().max() * size
    grid = minmax(weight, precision)
    found = solved(weight.double(), grid, turns=6)
    for i in range(2):
        w, scale, zero = (t[i].double().numpy() for t in (weight, grid.scale, grid.zero))
        expected = torch.from_numpy(textbook_hqq(w, scale, zero, precision, 6))
        torch.testing.assert_close(found[i].double(), expected, rtol=1e-9, atol=1e-9)
    codes = hqq(weight, precision)
    whole = solved(weight, grid).round().clamp(0, precision.levels - 1)
    assert codes.zeros is not None
    assert torch.equal(codes.zeros.float(), whole)
    assert torch.equal(codes.codes, nearest(weight, Grid(grid.scale, whole, precision)).codes)


def test_a_float_zero_point_has_less_error_than_that_of_the_range() -> None:
    weight, precision = weights(2, 32, 128), Precision(2, 32)
    grid = minmax(weight, precision)
    w, scale = weight.unflatten(-1, (4, 32)), grid.scale.unsqueeze(-1)

    def error(zero: torch.Tensor) -> float:
        z = zero.unsqueeze(-1)
        q = (w / scale + z).round().clamp(0, precision.levels - 1)
        return float((w - (q - z) * scale).square().mean())

    assert error(solved(weight, grid)) < 0.97 * error(grid.zero)


def test_symmetric_precisions_are_rounded_plainly() -> None:
    weight, precision = weights(2, 8, 64), Precision(3, 32, True)
    assert torch.equal(dequantize(hqq(weight, precision)), dequantize(rtn(weight, precision)))


def test_degenerate_weights_stay_as_they_are() -> None:
    weight = torch.zeros(2, 8, 64)
    weight[1] = 0.5
    assert torch.equal(dequantize(hqq(weight, Precision(4, 32))), weight)
