"""The codebook of pairs against a version that tries all points, in float64."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from textbook import inputs, moments_of, weights
from torch import Tensor

from mopeq.errors import InputError, ModelError
from mopeq.precision import Precision
from mopeq.qtensor import PAIRS, dequantize
from mopeq.quantizers import QUANTIZERS, gptq, moment_error, once, rtn_mse
from mopeq.quantizers.gptq import factored

BOOKS = [Precision(2, size, codebook=True) for size in (32, 64, -1)]
POINTS = np.array(PAIRS, dtype=np.float64)


def textbook(weight: np.ndarray, moments: np.ndarray, scale: np.ndarray, act_order: bool) -> np.ndarray:
    """Codes (out, in/2): pair after pair, the point that costs least once all columns left have made up for it."""
    weight, inp = weight.copy(), weight.shape[1]
    diagonal = np.diag(moments)
    inverse = np.linalg.inv(moments + 0.2 * diagonal.mean() * np.eye(inp))
    order = sorted(range(inp), key=lambda i: -diagonal[i]) if act_order else list(range(inp))
    codes, done = np.empty((len(weight), inp // 2), dtype=np.int64), set()
    for column in order:
        first = column // 8 * 8 + column % 4
        two = [first, first + 4]
        if first in done:
            continue
        done.add(first)
        cost = np.linalg.inv(inverse[np.ix_(two, two)])
        for row in range(len(weight)):
            error = weight[row, two] - POINTS * scale[row, first // (inp // scale.shape[1])]
            best = int(np.argmin(((error @ cost) * error).sum(1)))
            codes[row, first // 8 * 4 + first % 4] = best
            weight[row] -= error[best] @ cost @ inverse[two]
        inverse -= inverse[:, two] @ cost @ inverse[two]
        inverse[two] = inverse[:, two] = 0.0
        inverse[two, two] = 1.0  # done: nothing is made up for here from now on
    return codes


@pytest.mark.parametrize(("precision", "act_order"), [*product(BOOKS, (True, False))], ids=str)
def test_codes_are_those_of_the_textbook(precision: Precision, act_order: bool) -> None:
    weight, h = weights(2, 8, 128), moments_of(inputs(2, 200, 128))
    codes = gptq(weight, precision, h, act_order=act_order)
    assert codes.zeros is None
    want = [
        textbook(w, m, s, act_order)
        for w, m, s in zip(weight.double().numpy(), h.double().numpy(), codes.scales.double().numpy(), strict=True)
    ]
    assert (codes.codes.numpy() == np.stack(want)).mean() >= 0.999


def at_scales(weight: Tensor, scales: Tensor) -> Tensor:
    """Weights (experts, out, in) of the nearest points at given scales (experts, out, groups)."""
    experts, out, inp = weight.shape
    scale = scales.double().repeat_interleave(inp // scales.shape[-1] // 2, -1).unsqueeze(-1)
    pairs = weight.double().view(experts, out, -1, 2, 4).mT.reshape(experts, out, -1, 2) / scale
    points = torch.tensor(PAIRS).double()
    chosen = points[(pairs.unsqueeze(-2) - points).square().sum(-1).argmin(-1)] * scale
    return chosen.view(experts, out, -1, 4, 2).mT.reshape(weight.shape)


@pytest.mark.parametrize("precision", BOOKS, ids=str)
def test_plain_rounding_takes_the_nearest_point(precision: Precision) -> None:
    weight = torch.randn(2, 16, 128, generator=torch.Generator().manual_seed(0))
    codes = rtn_mse(weight, precision)
    assert (dequantize(codes) == at_scales(weight, codes.scales)).double().mean() > 0.999
    plain = rtn_mse(weight, Precision(2, precision.group_size))
    assert (dequantize(codes) - weight).square().sum() < (dequantize(plain) - weight).square().sum()


def test_compensation_and_points_lower_the_error() -> None:
    weight, h = torch.randn(3, 32, 128, generator=torch.Generator().manual_seed(0)), moments_of(inputs(3, 400, 128))
    book, plain = Precision(2, 64, codebook=True), Precision(2, 64)
    codes = gptq(weight, book, h)
    difference = at_scales(weight, codes.scales) - weight
    assert (moment_error(weight, codes, h) < 0.9 * ((difference @ h.double()) * difference).sum((1, 2))).all()
    assert (moment_error(weight, codes, h) < 0.9 * moment_error(weight, gptq(weight, plain, h), h)).all()


def test_what_is_shared_and_how_many_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, h = weights(3, 16, 128), moments_of(inputs(3, 100, 128))
    want = gptq(weight, BOOKS[1], h)
    assert gptq(weight, BOOKS[1], once(gptq, h)).codes.equal(want.codes)
    for e in range(3):
        alone = gptq(weight[e : e + 1], BOOKS[1], factored(h[e : e + 1]))
        assert (alone.codes[0] == want.codes[e]).float().mean() > 0.999
        assert alone.scales[0].equal(want.scales[e])


def test_zeros_stay_zeros_and_what_has_no_scale_is_refused() -> None:
    nothing = torch.zeros(1, 8, 64)
    assert not dequantize(gptq(nothing, BOOKS[0], torch.eye(64)[None])).any()
    with pytest.raises(ModelError, match="keep this matrix at 16 bits"):
        rtn_mse(nothing + torch.inf, BOOKS[0])


@pytest.mark.parametrize("method", ["rtn", "hqq", "signround"])
def test_methods_without_codebooks_say_so(method: str) -> None:
    with pytest.raises(InputError, match="2g32c has a codebook, which only the methods gptq and rtn-mse can use"):
        QUANTIZERS[method](weights(1, 8, 64), BOOKS[0], torch.eye(64)[None])
