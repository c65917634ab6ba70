"""What codes do to tokens that they were fitted to, as if they had not been."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mopeq.precision import Precision
from mopeq.qtensor import dequantize
from mopeq.quantizers import gptq, once
from mopeq.quantizers.gptq import DAMPING, Factored
from unfitted import unfitted

INPUTS = 32


def tokens(count: int, seed: int) -> Tensor:
    """Inputs (count, in) that are correlated, a few of them large."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(INPUTS, INPUTS, generator=torch.Generator().manual_seed(7)) * torch.logspace(0, -1.5, INPUTS)
    return torch.randn(count, INPUTS, generator=generator) @ mixing.T * (1 + torch.rand(count, 1, generator=generator))


def factors_of(x: Tensor, counts: Tensor) -> Factored:
    made = once(gptq, ((x.T * counts) @ x)[None])
    assert isinstance(made, Factored)
    return made


def mean_of(x: Tensor, counts: Tensor) -> Tensor:
    return ((x.T * counts) @ x).diagonal().mean()


def regressed(h: Tensor) -> Tensor:
    """R^-1 of R P R^T, row by row: each column's regression on those after it, float64."""
    made = torch.eye(len(h), dtype=h.dtype)
    for j in range(len(h) - 1):
        made[j, j + 1 :] = -torch.linalg.solve(h[j + 1 :, j + 1 :], h[j + 1 :, j])
    return made


def slowly(x: Tensor, counts: Tensor) -> Iterator[Tensor]:
    """The same for each token, by fitting the regressions again without it."""
    h = ((x.T * counts) @ x).double()
    order = h.diagonal().argsort(descending=True, stable=True)
    damped = h[order][:, order] + DAMPING * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    whole = regressed(damped)
    for one, n in zip(x.double()[:, order], counts, strict=True):
        made = torch.empty_like(one)
        made[order] = torch.linalg.solve(whole, regressed(damped - n * torch.outer(one, one)) @ one)
        yield made


@pytest.mark.parametrize("count", [3, 200])
def test_each_token_is_as_if_the_rest_alone_had_been_fitted(count: int) -> None:
    x, counts = tokens(count, 0), torch.rand(count, generator=torch.Generator().manual_seed(1)) + 0.1
    found = unfitted(factors_of(x, counts), 0, mean_of(x, counts), x, counts)
    for t, wanted in zip(range(9), slowly(x, counts), strict=False):
        torch.testing.assert_close(found[t], wanted.float(), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("count", [12, 48, 400])
def test_errors_are_those_on_tokens_that_were_not_fitted(count: int) -> None:
    own, left_out, fresh = 0.0, 0.0, 0.0
    for seed in range(24):
        x, other = tokens(count, 2 * seed), tokens(2000, 2 * seed + 1)
        weight = torch.randn(1, 24, INPUTS, generator=torch.Generator().manual_seed(seed))
        fit, ones = factors_of(x, torch.ones(count)), torch.ones(count)
        error = (dequantize(gptq(weight, Precision(3, INPUTS), fit)) - weight)[0]
        own += float((x @ error.T).square().mean()) / 24
        left_out += float((unfitted(fit, 0, mean_of(x, ones), x, ones) @ error.T).square().mean()) / 24
        fresh += float((other @ error.T).square().mean()) / 24
    assert own < {12: 0.35, 48: 0.75, 400: 0.98}[count] * fresh
    assert left_out == pytest.approx(fresh, rel=0.08)
