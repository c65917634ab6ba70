"""SignRound against the textbook, whose gradients are derived by hand."""

from __future__ import annotations

import importlib

import pytest
import torch
from textbook import inputs, moments_of, weights
from textbook import signround as textbook_signround

from mopeq.errors import DataError
from mopeq.precision import Precision
from mopeq.qtensor import dequantize
from mopeq.quantizers import moment_error, rtn, signround

module = importlib.import_module("mopeq.quantizers.signround")


@pytest.mark.parametrize("precision", [Precision(2, 32), Precision(3, 64), Precision(4, -1), Precision(3, 32, True)])
def test_codes_are_those_of_the_textbook(precision: Precision) -> None:
    weight, h = weights(2, 8, 64, seed=precision.bits).double(), moments_of(inputs(2, 200, 64)).double()
    scale, zero, codes = module._learned(weight, precision, h, 40)
    for i in range(2):
        expected = textbook_signround(weight[i].numpy(), h[i].numpy(), precision, 40)
        assert torch.equal(scale[i].double(), torch.from_numpy(expected[0]).squeeze(-1))
        assert torch.equal(zero[i].double(), torch.from_numpy(expected[1]).squeeze(-1))
        assert torch.equal(codes[i].long(), torch.from_numpy(expected[2]))


@pytest.mark.parametrize("precision", [Precision(2, 32), Precision(4, 64), Precision(3, 64, True)], ids=str)
def test_the_error_falls_with_every_iteration_spent(precision: Precision) -> None:
    weight, h = weights(3, 32, 128), moments_of(inputs(3, 300, 128))
    errors = [moment_error(weight, signround(weight, precision, h, iterations=n), h) for n in (0, 50, 200)]
    plain = moment_error(weight, rtn(weight, precision), h)
    assert (errors[0] <= 1.001 * plain).all()
    assert (errors[1] < errors[0]).all()
    assert (errors[2] < 0.9 * errors[0]).all()


def test_experts_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, h = weights(3, 16, 64), moments_of(inputs(3, 100, 64))
    together = signround(weight, Precision(3, 32), h, iterations=20)
    monkeypatch.setattr(module, "CHUNK", 1)
    apart = signround(weight, Precision(3, 32), h, iterations=20)
    assert float((together.codes == apart.codes).double().mean()) > 0.995


def test_an_expert_without_tokens_is_learned_on_plain_error() -> None:
    weight, h = weights(2, 16, 64), moments_of(inputs(2, 100, 64))
    h[1] = 0
    codes = signround(weight, Precision(2, 32), h, iterations=20)
    h[1] = torch.eye(64)
    assert torch.equal(codes.codes, signround(weight, Precision(2, 32), h, iterations=20).codes)


def test_degenerate_weights() -> None:
    h = moments_of(inputs(2, 100, 64))
    weight = weights(2, 8, 64)
    weight[0] = 0
    weight[1, :, :32] = 0
    made = dequantize(signround(weight, Precision(4, 32), h, iterations=5))
    assert torch.equal(made[0], weight[0])
    assert torch.isfinite(made).all()


def test_what_cannot_be_used_is_refused() -> None:
    weight, h = weights(2, 8, 64), moments_of(inputs(2, 100, 64))
    with pytest.raises(DataError, match="signround needs the moments"):
        signround(weight, Precision(3, 32))
    with pytest.raises(ValueError, match=r"expected \(2, 64, 64\)"):
        signround(weight, Precision(3, 32), h[:1])
    h[1, 0, 0] = torch.nan
    with pytest.raises(DataError, match=r"moments of matrices \[1\]"):
        signround(weight, Precision(3, 32), h)
