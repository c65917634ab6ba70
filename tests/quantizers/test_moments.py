"""Moments of experts with few tokens, and the error they measure."""

from __future__ import annotations

import pytest
import torch
from textbook import inputs, moments_of, weights

from mopeq.precision import Precision
from mopeq.qtensor import dequantize
from mopeq.quantizers import fallback_moments, moment_error, rtn


def test_enough_tokens_change_nothing() -> None:
    h = moments_of(inputs(3, 10, 8))
    same, short = fallback_moments(h, [10, 10, 12], 10)
    assert same is h
    assert short == ()


def test_few_tokens_are_filled_up_with_the_mean_token() -> None:
    h = moments_of(inputs(3, 10, 8))
    h[2] = 0
    tokens = torch.tensor([4, 20, 0])
    mean = h.sum(0) / 24
    made, short = fallback_moments(h, tokens, 10)
    assert short == (0, 2)
    torch.testing.assert_close(made[0], h[0] + 6 * mean)
    assert torch.equal(made[1], h[1])
    torch.testing.assert_close(made[2], 10 * mean)
    assert (h[2] == 0).all()


def test_the_rule_is_linear_in_the_moments() -> None:
    h = moments_of(inputs(3, 10, 8))
    made, _ = fallback_moments(h, [1, 2, 30], 16)
    scaled, _ = fallback_moments(8 * h, [1, 2, 30], 16)
    torch.testing.assert_close(scaled, 8 * made)


def test_a_layer_without_tokens_gets_identities() -> None:
    made, short = fallback_moments(torch.zeros(2, 4, 4), [0, 0], 1)
    assert short == (0, 1)
    assert torch.equal(made, torch.eye(4).expand(2, 4, 4))


def test_counts_must_match_the_experts() -> None:
    with pytest.raises(ValueError, match="token counts for 2 experts"):
        fallback_moments(torch.zeros(2, 4, 4), [1, 2, 3], 1)


def test_the_error_is_that_of_the_outputs() -> None:
    weight, x = weights(3, 8, 64), inputs(3, 40, 64)
    codes = rtn(weight, Precision(3, 32))
    outputs = x.double() @ (weight - dequantize(codes)).double().transpose(1, 2)
    got = moment_error(weight, codes, moments_of(x))
    assert got.shape == (3,)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, outputs.square().sum((1, 2)), rtol=1e-4, atol=0)
