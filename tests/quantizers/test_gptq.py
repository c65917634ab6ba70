"""GPTQ against the textbook, and what must not change its answer."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from textbook import gptq as textbook_gptq
from textbook import grid_of, inputs, moments_of, values, weights
from torch import Tensor

from mopeq.errors import DataError
from mopeq.precision import BITS, GROUP_SIZES, Precision
from mopeq.qtensor import Codes, dequantize
from mopeq.quantizers import QUANTIZERS, gptq, moment_error, once, rtn_mse
from mopeq.quantizers.gptq import FACTORS, factored
from mopeq.quantizers.grid import Grid, minmax, nearest, searched
from mopeq.quantizers.rtn import importance

module = importlib.import_module("mopeq.quantizers.gptq")
QUANTIZED = [Precision(b, g, s) for b in BITS if b < 16 for g in GROUP_SIZES for s in (False, True)]


def same(a: Codes, b: Codes, share: float = 0.999) -> bool:
    return torch.equal(a.scales, b.scales) and float((a.codes == b.codes).double().mean()) >= share


KINDS = [(FACTORS, True), (FACTORS, False), ((), True), ((), False)]


@pytest.mark.parametrize(
    ("precision", "factors", "act_order"),
    [(p, *KINDS[i % 4]) for i, p in enumerate(QUANTIZED)] + [(Precision(3, 32), *kind) for kind in KINDS],
    ids=str,
)
def test_codes_are_those_of_the_textbook(precision: Precision, factors: Sequence[float], act_order: bool) -> None:
    weight, h = weights(2, 8, 128, seed=precision.bits), moments_of(inputs(2, 200, 128))
    codes = gptq(weight, precision, h, act_order=act_order, factors=factors)
    equal = 0
    for i in range(2):
        scale, zero = grid_of(codes[i])
        w, hessian = weight[i].double().numpy(), h[i].double().numpy()
        expected = textbook_gptq(w, hessian, scale, zero, precision, 0.2, act_order)
        equal += int((codes.codes[i].numpy() == expected).sum())
        difference = w - values(expected, scale, zero)
        error = float(((difference @ hessian) * difference).sum())
        assert float(moment_error(weight, codes, h)[i]) == pytest.approx(error, rel=1e-4)
    assert equal >= 0.999 * weight.numel()


@pytest.mark.parametrize("factors", [FACTORS, (0.5, 1.0), ()], ids=str)
def test_grids_are_static(factors: Sequence[float]) -> None:
    weight, h = weights(2, 16, 128), moments_of(inputs(2, 200, 128))
    precision = Precision(3, 32)
    codes = gptq(weight, precision, h, factors=factors)
    expected = searched(weight, precision, importance(h), factors=factors, refits=0)
    grid = expected if factors else minmax(weight, precision)
    assert torch.equal(codes.scales.float(), grid.scale)
    assert codes.zeros is not None
    assert torch.equal(codes.zeros.float(), grid.zero)


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(QUANTIZED), st.integers(0, 10**6), st.integers(20, 300))
def test_error_is_not_above_that_of_rounding_on_the_same_grids(precision: Precision, seed: int, tokens: int) -> None:
    weight, h = weights(3, 32, 128, seed), moments_of(inputs(3, tokens, 128, seed))
    damped = h + 0.2 * h.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(128)
    codes = gptq(weight, precision, h)
    zero = torch.full_like(codes.scales, precision.levels // 2) if codes.zeros is None else codes.zeros
    rounded = nearest(weight, Grid(codes.scales.float(), zero.float(), precision))
    assert (moment_error(weight, codes, damped) < moment_error(weight, rounded, damped)).all()


@pytest.mark.parametrize("precision", [Precision(2, 64), Precision(3, 64), Precision(4, 64)], ids=str)
def test_damping_helps_inputs_that_were_not_seen(precision: Precision) -> None:
    """Moments of 96 tokens for 128 channels; the other 4,000 are what counts."""
    weight, x = weights(1, 64, 128), inputs(1, 4096, 128)
    seen, unseen = moments_of(x[:, :96]), moments_of(x[:, 96:])
    fitted = moment_error(weight, gptq(weight, precision, seen, damping=0.01), unseen)
    assert moment_error(weight, gptq(weight, precision, seen), unseen) < fitted


@pytest.mark.parametrize("precision", [Precision(2, 32), Precision(4, -1, True)], ids=str)
def test_batched_is_one_by_one(precision: Precision) -> None:
    weight, h = weights(5, 16, 128), moments_of(inputs(5, 200, 128))
    together = gptq(weight, precision, h)
    for i in range(5):
        assert same(together[i], gptq(weight[i : i + 1], precision, h[i : i + 1])[0])


def test_parts_make_the_same_codes_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, h = weights(5, 16, 128), moments_of(inputs(5, 200, 128))
    whole = gptq(weight, Precision(3, 64), h)
    monkeypatch.setattr(module, "CHUNK", 2 * 128 * (128 + 16))
    assert same(whole, gptq(weight, Precision(3, 64), h))


@pytest.mark.parametrize("leaf", [1, 7, 64, 1000])
def test_blocks_do_not_change_the_codes(monkeypatch: pytest.MonkeyPatch, leaf: int) -> None:
    weight, h = weights(2, 32, 128), moments_of(inputs(2, 200, 128))
    blocked = gptq(weight, Precision(3, 32), h)
    monkeypatch.setattr(module, "LEAF", leaf)
    assert same(blocked, gptq(weight, Precision(3, 32), h))


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**40, 1e-9, 3e7])
def test_the_scale_of_the_moments_does_not_matter(factor: float) -> None:
    weight, h = weights(2, 32, 128), moments_of(inputs(2, 200, 128))
    assert same(gptq(weight, Precision(3, 32), h), gptq(weight, Precision(3, 32), factor * h))


def test_experts_may_differ_in_scale_by_any_factor() -> None:
    weight, h = weights(3, 16, 64), moments_of(inputs(3, 100, 64))
    scaled = h * torch.tensor([2.0**-50, 1.0, 2.0**50])[:, None, None]
    assert same(gptq(weight, Precision(2, 32), h), gptq(weight, Precision(2, 32), scaled))


def test_the_order_of_inputs_does_not_matter_with_one_group() -> None:
    weight, h = weights(2, 32, 64), moments_of(inputs(2, 200, 64))
    shuffle = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    shuffled = gptq(weight[:, :, shuffle], Precision(4, -1), h[:, shuffle][:, :, shuffle])
    plain = gptq(weight, Precision(4, -1), h)
    assert float((shuffled.codes == plain.codes[:, :, shuffle]).double().mean()) >= 0.999


def test_identity_moments_are_plain_rounding() -> None:
    weight = weights(2, 16, 64)
    eye = torch.eye(64).expand(2, 64, 64)
    grid = searched(weight, Precision(3, 32), factors=FACTORS, refits=0)
    assert torch.equal(gptq(weight, Precision(3, 32), eye).codes, nearest(weight, grid).codes)


def test_an_expert_without_tokens_is_rounded_plainly() -> None:
    weight, h = weights(3, 16, 64), moments_of(inputs(3, 100, 64))
    h[1] = 0
    codes = gptq(weight, Precision(2, 32), h)
    grid = searched(weight, Precision(2, 32), factors=FACTORS, refits=0)
    assert torch.equal(codes.codes[1], nearest(weight, grid).codes[1])
    h[1] = torch.eye(64)
    assert same(codes, gptq(weight, Precision(2, 32), h))


def test_dead_inputs_are_rounded_and_leave_the_others_alone() -> None:
    x = inputs(2, 200, 64)
    dead = torch.arange(0, 64, 5)
    x[:, :, dead] = 0
    weight, h = weights(2, 16, 64), moments_of(x)
    codes = gptq(weight, Precision(4, 32), h, factors=())
    plain = nearest(weight, minmax(weight, Precision(4, 32)))
    assert torch.equal(codes.codes[:, :, dead], plain.codes[:, :, dead])
    assert not torch.equal(codes.codes, plain.codes)


@pytest.mark.parametrize("tokens", [1, 2, 10])
def test_fewer_tokens_than_inputs(tokens: int) -> None:
    weight, x = weights(2, 16, 128), inputs(2, tokens, 128)
    codes = gptq(weight, Precision(3, 64), moments_of(x))
    output = x @ (weight - dequantize(codes)).transpose(1, 2)
    plain = x @ (weight - dequantize(rtn_mse(weight, Precision(3, 64)))).transpose(1, 2)
    assert output.square().sum() < 0.5 * plain.square().sum()


def test_degenerate_weights() -> None:
    h = moments_of(inputs(4, 100, 64))
    weight = weights(4, 8, 64)
    weight[0] = 0
    weight[1] = 0.5
    weight[2, :, :32] = 0
    codes = gptq(weight, Precision(4, 32), h)
    assert torch.equal(dequantize(codes)[:2], weight[:2])
    assert torch.isfinite(dequantize(codes)).all()


def test_float64_takes_over_where_float32_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(3, 4, 64)
    weight, h = weights(3, 16, 64), moments_of(x)
    called: list[int] = []
    slowly = module._factor_slowly

    def counted(matrix: Tensor, damping: float) -> Tensor:
        called.append(1)
        made: Tensor = slowly(matrix, damping)
        return made

    monkeypatch.setattr(module, "_factor_slowly", counted)
    codes = gptq(weight, Precision(3, 32), h, damping=1e-9)
    assert called
    assert torch.isfinite(dequantize(codes)).all()
    plain = rtn_mse(weight, Precision(3, 32), h)
    assert (moment_error(weight, codes, h) < moment_error(weight, plain, h)).all()


def test_moments_that_cannot_be_used_are_refused() -> None:
    weight, h = weights(3, 16, 64), moments_of(inputs(3, 100, 64))
    with pytest.raises(DataError, match="gptq needs the moments of calibration inputs, found none"):
        gptq(weight, Precision(3, 32))
    with pytest.raises(ValueError, match=r"expected \(3, 64, 64\)"):
        gptq(weight, Precision(3, 32), h[:2])
    for bad in (torch.nan, torch.inf):
        broken = h.clone()
        broken[1, 3, 4] = bad
        with pytest.raises(DataError, match=r"moments of matrices \[1\] of the batch are not finite"):
            gptq(weight, Precision(3, 32), broken)
    negative = torch.eye(64).expand(3, 64, 64).clone()
    negative[2, :32, :32] -= 3 * torch.ones(32, 32) * (1 - torch.eye(32))
    with pytest.raises(DataError, match="not positive semidefinite"):
        gptq(weight, Precision(3, 32), negative)


def test_inputs_are_left_alone() -> None:
    weight, h = weights(2, 16, 64), moments_of(inputs(2, 100, 64))
    before = weight.clone(), h.clone()
    for quantizer in QUANTIZERS.values():
        quantizer(weight, Precision(2, 32), h)
    assert torch.equal(weight, before[0])
    assert torch.equal(h, before[1])


@pytest.mark.parametrize("factors", [(), FACTORS])
def test_factors_are_the_same_at_every_precision(factors: tuple[float, ...]) -> None:
    weight, h = weights(3, 16, 128), moments_of(inputs(3, 200, 128))
    h[2] = 0
    shared = factored(h)
    for precision in QUANTIZED[::5]:
        alone, together = (gptq(weight, precision, given, factors=factors) for given in (h, shared))
        assert torch.equal(alone.codes, together.codes)
        assert torch.equal(alone.scales, together.scales)
        part = gptq(weight[1:], precision, shared[1:], factors=factors)
        assert torch.equal(part.codes, alone.codes[1:])
    assert once(rtn_mse, h) is h
    assert once(gptq, None) is None
    with pytest.raises(ValueError, match=r"moments \(3, 128, 128\); expected \(1, 128, 128\)"):
        gptq(weight[:1], Precision(2), shared)
