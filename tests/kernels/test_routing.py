"""Router and experts in one native call, against torch's softmax and top-k and the call for experts alone."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator

import pytest
import torch
from test_cpu_experts import HIDDEN, MIX, SILU, isas, layer
from test_naive import flat, random_matrix
from torch import Tensor

from mopeq.errors import InputError
from mopeq.kernels import cpu, routing
from mopeq.kernels.attention import Stream
from mopeq.kernels.routing import Moe, Router
from mopeq.precision import Precision

pytestmark = pytest.mark.skipif(bool(cpu.why_not()), reason="no compiled kernel")
GROUPS = layer() if not cpu.why_not() else None
KINDS = list(itertools.product((torch.float32, torch.bfloat16, torch.float16), (False, True), (False, True)))


@pytest.fixture
def back() -> Iterator[None]:
    """The instruction set and threads of before."""
    lib, threads = cpu.library(), torch.get_num_threads()
    isa = lib.mopeq_isa()
    yield
    lib.mopeq_use_isa(isa)
    torch.set_num_threads(threads)


def given(dtype: torch.dtype, seed: int = 0) -> tuple[Stream, Tensor]:
    """A token's ``h`` and a router's weights, in the type of a model."""
    draw = torch.Generator().manual_seed(seed)
    stream = Stream(HIDDEN, 16, dtype)
    stream.h.copy_(torch.randn(HIDDEN, generator=draw) / 64)  # float16 ends at 65504
    return stream, torch.randn(len(MIX), HIDDEN, generator=draw).to(dtype) * 8


def by_torch(stream: Stream, router: Router) -> Tensor:
    """As the routers of transformers do it, then the experts by the call that takes index and weights."""
    x = stream.h.view(1, -1)
    scores = torch.softmax(torch.nn.functional.linear(x, router.weight).float(), -1)
    weights, index = scores.topk(router.k, -1)
    if router.normalized:
        weights = weights / weights.sum(-1, keepdim=True)
    return cpu.experts(x, index, weights.to(x.dtype) if router.rounded else weights, *GROUPS, SILU)


@pytest.mark.parametrize(("dtype", "normalized", "rounded"), KINDS)
def test_the_same_as_torch(dtype: torch.dtype, normalized: bool, rounded: bool) -> None:
    for seed in range(8):
        stream, weight = given(dtype, seed)
        router = Router(weight, 3, normalized, rounded)
        want = by_torch(stream, router).float()
        got = Moe(stream, router, *GROUPS, SILU)()
        assert got.shape == (1, 1, HIDDEN)
        assert got.dtype is dtype
        # the weights may fall on the other side of a rounding to 16 bits
        bound = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        assert (got.float() - want).norm() < bound * want.norm()


@pytest.mark.usefixtures("back")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_instruction_sets_change_nothing(dtype: torch.dtype) -> None:
    stream, weight = given(dtype)
    moe, runs = Moe(stream, Router(weight, 3, True, True), *GROUPS, SILU), []
    for isa, threads in itertools.product(isas(), (1, 2)):
        cpu.library().mopeq_use_isa(isa)
        torch.set_num_threads(threads)
        runs.append(moe().clone())
    assert all(run.equal(runs[0]) for run in runs)


def test_of_equal_scores_the_first() -> None:
    stream, weight = given(torch.float32)
    moe = Moe(stream, Router(torch.zeros_like(weight), 2, True, False), *GROUPS, SILU)
    want = cpu.experts(stream.h.view(1, -1), torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]), *GROUPS, SILU)
    assert torch.equal(moe().view(1, -1), want)


def test_undefined_numbers_stay_visible() -> None:
    stream, weight = given(torch.float32)
    weight[4] = torch.nan
    assert Moe(stream, Router(weight, 3, True, True), *GROUPS, SILU)().isnan().all()


def test_refusals() -> None:
    stream, weight = given(torch.float32)
    with pytest.raises(InputError, match="a router got weights"):
        Moe(stream, Router(weight[1:], 3, True, True), *GROUPS, SILU)
    plain = flat([[random_matrix((HIDDEN, 64), Precision(4, 32))]])
    with pytest.raises(InputError, match="expected panels"):
        Moe(stream, Router(weight, 3, True, True), GROUPS[0], plain, SILU)
    for k in (0, len(MIX) + 1):
        with pytest.raises(InputError, match="do not fit together"):
            Moe(stream, Router(weight, k, True, True), *GROUPS, SILU)()
    assert cpu.library().mopeq_moe(None) == 1
    assert cpu.library().mopeq_moe(ctypes.byref(routing._Job())) == 1
