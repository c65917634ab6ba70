"""Grids, codes and bit strings of the compiled library against those on torch: every bit, on every instruction set."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from mopeq import native, qtensor
from mopeq.errors import InputError, ModelError
from mopeq.precision import BITS, GROUP_SIZES, Precision
from mopeq.qtensor import Codes, pack_bits
from mopeq.quantizers import compiled, gptq, grid, hqq, rtn, rtn_mse
from mopeq.quantizers.grid import minmax, nearest, searched

pytestmark = pytest.mark.skipif(bool(native.why_not()), reason="no compiled kernel")
QUANTIZED = [Precision(b, g, s) for b in BITS if b < 16 for g in GROUP_SIZES for s in (False, True)]
T = TypeVar("T")


@pytest.fixture(
    params=range(0 if native.why_not() else native.library().mopeq_best_isa() + 1), ids=lambda i: native.ISAS[i]
)
def every_isa(request: pytest.FixtureRequest) -> Iterator[None]:
    lib = native.library()
    before = lib.mopeq_isa()
    assert lib.mopeq_use_isa(request.param) == 0
    yield
    lib.mopeq_use_isa(before)


@pytest.fixture
def on_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], T]], T]:
    """Runs something without the library."""

    def run(work: Callable[[], T]) -> T:
        with monkeypatch.context() as without:
            without.setattr(compiled, "takes", lambda *_: False)
            without.setattr(qtensor, "why_not", lambda: "not wanted")
            return work()

    return run


def kinds() -> dict[str, Tensor]:
    """float32 (2, 19, 384): experts of no whole number of blocks of rows."""
    g = torch.Generator().manual_seed(1)
    plain = torch.randn(2, 19, 384, generator=g)
    constant = plain.bfloat16().float()
    constant[0, 3], constant[1, 5], constant[0, 7, :200], constant[1, 18, 128:] = 0, 1.5, -0.25, -0.0
    tails = plain.pow(3) + 0.2
    return {
        "normal": plain / 30, "constant": constant, "tails": tails, "whole": (3 * plain).round(), "huge": 1e4 * plain,
        "tiny": plain * 2.0**-24, "denormal": plain * 2.0**-130, "one side": plain.abs() + 3,
    }  # fmt: skip


def same(got: Codes, want: Codes) -> bool:
    zeros = got.zeros is None if want.zeros is None else got.zeros is not None and torch.equal(got.zeros, want.zeros)
    return torch.equal(got.codes, want.codes) and torch.equal(got.scales, want.scales) and zeros


@pytest.mark.usefixtures("every_isa")
@pytest.mark.parametrize("precision", QUANTIZED, ids=str)
def test_every_bit_is_that_on_torch(precision: Precision, on_torch: Callable[[Callable[[], Codes]], Codes]) -> None:
    h = torch.rand(2, 384, generator=torch.Generator().manual_seed(2)) ** 4
    h[1, 100:300] = 0
    for name, weight in kinds().items():
        works: list[Callable[[], Codes]] = [
            lambda w=weight: rtn(w, precision),
            lambda w=weight: rtn_mse(w, precision),
            lambda w=weight: nearest(w, searched(w, precision, h, factors=(1.1, 1, 0.9), refits=1)),
            lambda w=weight: nearest(w / 2, minmax(w, precision)),
        ]
        for number, work in enumerate(works):
            assert same(work(), on_torch(work)), (name, number)


@pytest.mark.usefixtures("every_isa")
def test_long_groups_have_the_same_order_of_sums(on_torch: Callable[[Callable[[], Codes]], Codes]) -> None:
    """Sums of runs, of runs of runs and of runs of those, with something left over of each."""
    weight = torch.randn(1, 5, 4096 + 256 + 48 + 8, generator=torch.Generator().manual_seed(3))
    h = torch.rand(1, weight.shape[2], generator=torch.Generator().manual_seed(4))
    for bits in (2, 8):
        work = lambda: nearest(weight, searched(weight, Precision(bits, -1), h))  # noqa: E731, B023
        assert same(work(), on_torch(work))


@pytest.mark.parametrize("method", [gptq, hqq])
def test_the_other_quantizers_are_the_same(
    method: Callable[..., Codes], on_torch: Callable[[Callable[[], Codes]], Codes]
) -> None:
    weight, x = kinds()["tails"], torch.randn(2, 500, 384, generator=torch.Generator().manual_seed(5))
    moments = x.mT @ x
    for precision in (Precision(3, 64), Precision(4, 128, True)):
        assert same(method(weight, precision, moments), on_torch(lambda p=precision: method(weight, p, moments)))


def test_threads_and_views_change_nothing() -> None:
    weight, threads = kinds()["tails"], torch.get_num_threads()
    want = rtn_mse(weight, Precision(3, 64))
    try:
        torch.set_num_threads(3)
        assert same(rtn_mse(weight, Precision(3, 64)), want)
    finally:
        torch.set_num_threads(threads)
    assert same(rtn_mse(weight.mT.contiguous().mT, Precision(3, 64)), want)
    alone = rtn_mse(weight[1:, 4:9], Precision(3, 64))
    assert torch.equal(alone.codes[0], want.codes[1, 4:9])


@pytest.mark.usefixtures("every_isa")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_what_is_not_finite_or_too_large_is_refused(bad: float) -> None:
    for place in (0, 37, 127):  # in the first vector, a later one, the last
        weight = torch.zeros(3, 8, 128)
        weight[2, 1, place] = bad
        for precision in (Precision(4, 32), Precision(8, -1, True)):
            for method in (rtn, rtn_mse):
                with pytest.raises(ModelError, match="in matrix 2 of the batch"):
                    method(weight, precision)


def test_errors_that_count_negative_go_without_the_library() -> None:
    weight, h = kinds()["normal"], torch.ones(2, 384)
    assert compiled.takes(weight, h)
    h[1, 7] = -1
    assert not compiled.takes(weight, h)
    assert searched(weight, Precision(4, 64), h).scale.shape == (2, 19, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_are_those_in_float32(dtype: torch.dtype) -> None:
    weight = kinds()["normal"].to(dtype)
    for got, want in zip(
        compiled.grids(weight, Precision(4, 64), None, grid.FACTORS, 1, codes=True) or (),
        compiled.grids(weight.float(), Precision(4, 64), None, grid.FACTORS, 1, codes=True) or (),
        strict=True,
    ):
        assert got is not None
        assert want is not None
        assert torch.equal(got, want)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_bit_strings_are_those_on_torch(bits: int, on_torch: Callable[[Callable[[], Tensor]], Tensor]) -> None:
    codes = torch.randint(0, 2**bits, (5, 6, 72), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    for some in (codes, codes[:0], codes.transpose(0, 2)[..., :0], codes.transpose(0, 1)[:, 1:]):
        assert torch.equal(pack_bits(some, bits), on_torch(lambda s=some: pack_bits(s, bits)))


def test_jobs_that_make_no_sense_are_refused() -> None:
    lib, weight = native.library(), torch.zeros(1, 8, 64)
    room = weight.data_ptr()

    def fault(**changed: int) -> int:
        job = {
            "weight": room,
            "experts": 1,
            "rows": 8,
            "inputs": 64,
            "groups": 2,
            "bits": 4,
            "scale": room,
            "zero": room,
        }
        code: int = lib.mopeq_grids(ctypes.byref(compiled._Job(**{**job, **changed})))
        return code

    assert lib.mopeq_grids(None) == 1
    assert [fault(weight=0), fault(factor_count=2)] == [1, 1]
    assert [fault(rows=0), fault(inputs=2**31), fault(refits=-1)] == [2, 2, 2]
    assert [fault(bits=1), fault(bits=9), fault(groups=3), fault(scale=room + 2), fault(type=3)] == [3, 3, 4, 7, 9]
    assert lib.mopeq_pack_bits(room, room, 12, 4, 1) == 2
    assert lib.mopeq_pack_bits(room, room, 8, 8, 1) == 3
    with pytest.raises(InputError, match="a group size is no multiple of 32"):
        native.check(4)
