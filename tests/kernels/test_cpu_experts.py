"""A layer's experts in one call of the compiled kernel, against the same steps in float64."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_naive import CODEBOOKS, error, flat, random_matrix
from torch import Tensor

from mopeq.errors import InputError
from mopeq.kernels import PackedGroup, convert, cpu, naive
from mopeq.kernels.cpu import experts
from mopeq.precision import FULL, Precision
from mopeq.seam import Gate

pytestmark = pytest.mark.skipif(bool(cpu.why_not()), reason="no compiled kernel")
KINDS = itertools.cycle(((32, False), (-1, True), (64, False)))
MIX = (FULL, *(Precision(bits, *next(KINDS)) for bits in (2, 3, 4, 5, 6, 8)))
SILU, CLAMPED = Gate(), Gate(1.702, 1.5, 1.0, interleaved=True)
HIDDEN, INNER = 128, 64


def isas() -> range:
    return range(0 if cpu.why_not() else cpu.library().mopeq_best_isa() + 1)


@pytest.fixture(params=isas(), ids=lambda i: cpu.ISAS[i])
def every_isa(request: pytest.FixtureRequest) -> Iterator[int]:
    lib = cpu.library()
    before = lib.mopeq_isa()
    assert lib.mopeq_use_isa(request.param) == 0
    yield request.param
    lib.mopeq_use_isa(before)


def layer(
    mix: tuple[Precision, ...] = MIX, hidden: int = HIDDEN, inner: int = INNER
) -> tuple[PackedGroup, PackedGroup]:
    def group(shapes: tuple[tuple[int, int], ...], precisions: tuple[Precision, ...]) -> PackedGroup:
        rows = [[random_matrix(s, p, 7 * e + i) for i, s in enumerate(shapes)] for e, p in enumerate(precisions)]
        return convert(flat(rows), "panels")

    return group(((inner, hidden),) * 2, mix), group(((hidden, inner),), mix[1:] + mix[:1])


def routed(tokens: int, k: int = 3, hidden: int = HIDDEN, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=draw)
    index = torch.rand(tokens, len(MIX), generator=draw).argsort(-1)[:, :k]
    return x, index, torch.rand(tokens, k, generator=draw)


def biases_of(groups: tuple[PackedGroup, PackedGroup]) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return tuple(torch.randn(g.experts, g.out_features, generator=draw) for g in groups)  # type: ignore[return-value]


def twin(
    x: Tensor, index: Tensor, weights: Tensor, gate_up: PackedGroup, down: PackedGroup, gate: Gate,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:  # fmt: skip
    """Token by token in float64."""
    x, total = x.double(), torch.zeros(x.shape, dtype=torch.float64)
    for token, slot in itertools.product(range(index.shape[0]), range(index.shape[1])):
        e = int(index[token, slot])
        if not 0 <= e < gate_up.experts:
            continue
        only = (torch.arange(gate_up.experts + 1) > e).long()
        g, u = naive.grouped_linear(x[token : token + 1], gate_up, only).chunk(2, -1)
        if biases[0] is not None:
            own = biases[0][e].double()
            g, u = (
                (g + own[::2], u + own[1::2])
                if gate.interleaved
                else (g + own[: len(own) // 2], u + own[len(own) // 2 :])
            )
        g, u = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit)
        row = naive.grouped_linear((u + gate.shift) * g * torch.sigmoid(gate.alpha * g), down, only)[0]
        total[token] += weights[token, slot].double() * (row if biases[1] is None else row + biases[1][e].double())
    return total


@pytest.mark.usefixtures("every_isa")
@pytest.mark.parametrize("gate", [SILU, CLAMPED, Gate(interleaved=True), Gate(0.5, 0.7)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_equals_its_steps(gate: Gate, biased: bool) -> None:
    groups = layer()
    biases = biases_of(groups) if biased else (None, None)
    for tokens in (1, 2, 19):
        x, index, weights = routed(tokens, seed=tokens)
        got = experts(x, index, weights, *groups, gate, biases)
        assert error(got, twin(x, index, weights, *groups, gate, biases)) < 1e-5
    for one in ((biases[0], None), (None, biases[1])):
        assert error(experts(x, index, weights, *groups, gate, one), twin(x, index, weights, *groups, gate, one)) < 1e-5


@pytest.mark.usefixtures("every_isa")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2e-3), (torch.float16, 1e-3)])
def test_half_precision_rounds_once(dtype: torch.dtype, limit: float) -> None:
    groups = layer()
    x, index, weights = routed(9)
    x, weights, biases = x.to(dtype), weights.to(dtype), tuple(b.to(dtype) for b in biases_of(groups))
    got = experts(x, index, weights, *groups, CLAMPED, biases, digits=2)  # type: ignore[arg-type]
    assert got.dtype == dtype
    assert error(got, twin(x, index, weights, *groups, CLAMPED, biases)) < limit  # type: ignore[arg-type]
    whole = experts(x.float(), index, weights, *groups, CLAMPED, biases, digits=2)  # type: ignore[arg-type]
    assert got.equal(whole.to(dtype))


def test_codebooks_beside_other_widths() -> None:
    groups = layer((*MIX[:4], *CODEBOOKS[:2], CODEBOOKS[3]))
    lib, isa = cpu.library(), cpu.library().mopeq_isa()
    x, index, weights = routed(19)
    try:
        for gate in (SILU, CLAMPED):
            want = experts(x, index, weights, *groups, gate)
            assert error(want, twin(x, index, weights, *groups, gate)) < 1e-5
            for which in isas():
                lib.mopeq_use_isa(which)
                assert experts(x, index, weights, *groups, gate).equal(want)
    finally:
        lib.mopeq_use_isa(isa)


def test_the_same_bits_on_every_path() -> None:
    """Instruction sets, threads, and neighbours in the batch change nothing."""
    lib, threads, isa = cpu.library(), torch.get_num_threads(), cpu.library().mopeq_isa()
    groups = layer(hidden=256, inner=192)
    x, index, weights = routed(40, hidden=256)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            want = experts(x.to(dtype), index, weights, *groups, SILU)
            for which, count in itertools.product(isas(), (1, 2, 5)):
                lib.mopeq_use_isa(which)
                torch.set_num_threads(count)
                assert experts(x.to(dtype), index, weights, *groups, SILU).equal(want)
            for t in range(40):
                own = slice(t, t + 1)
                assert experts(x[own].to(dtype), index[own], weights[own], *groups, SILU)[0].equal(want[t])
    finally:
        torch.set_num_threads(threads)
        lib.mopeq_use_isa(isa)


def test_many_tokens_on_threads() -> None:
    """So many of each expert that panels are unpacked once for all (tile.inc); threads change nothing."""
    lib, threads, isa = cpu.library(), torch.get_num_threads(), cpu.library().mopeq_isa()
    groups = layer(hidden=256, inner=192)
    x, index, weights = routed(300, hidden=256)
    try:
        want = experts(x.bfloat16(), index, weights, *groups, SILU)
        for which, count in itertools.product(isas(), (1, 3)):
            lib.mopeq_use_isa(which)
            torch.set_num_threads(count)
            assert experts(x.bfloat16(), index, weights, *groups, SILU).equal(want)
    finally:
        torch.set_num_threads(threads)
        lib.mopeq_use_isa(isa)


def test_more_tokens_than_are_held_at_a_time() -> None:
    held = (1 << 24) // (3 * (2 * INNER + HIDDEN))
    groups = layer()
    x, index, weights = routed(held + 5)
    rest = (*groups, SILU, biases_of(groups))
    got = experts(x, index, weights, *rest)
    for t in (0, held - 1, held, held + 4):
        assert experts(x[t : t + 1], index[t : t + 1], weights[t : t + 1], *rest)[0].equal(got[t])


@pytest.mark.usefixtures("every_isa")
def test_unknown_experts_undefined_numbers_and_no_tokens() -> None:
    groups = layer()
    x, index, weights = routed(6)
    for stranger in (-1, len(MIX), 2**62):
        beside = torch.cat([index, torch.full((6, 1), stranger)], 1)
        more = torch.cat([weights, torch.ones(6, 1)], 1)
        assert experts(x, beside, more, *groups, SILU).equal(experts(x, index, weights, *groups, SILU))
        assert not experts(x, torch.full_like(index, stranger), weights, *groups, SILU).any()
    want = experts(x, index, weights, *groups, SILU)
    x[2, 5], x[3, 7], x[4] = float("nan"), float("inf"), 0.0
    got = experts(x, index, weights, *groups, SILU)
    assert got[:2].equal(want[:2])
    assert got[2].isnan().all()
    assert not got[3].isfinite().any()
    assert not got[4].any()
    assert experts(x[:0], index[:0], weights[:0], *groups, SILU).shape == (0, HIDDEN)


@pytest.mark.usefixtures("every_isa")
def test_gates_far_out() -> None:
    """Where e^-g overflows or vanishes, the gate is g or nearly zero, as in float64."""
    eye = torch.eye(32)
    matrix = random_matrix((32, 32), FULL)
    matrix.qweight.view(torch.bfloat16).copy_(eye.bfloat16())
    groups = tuple(convert(flat([[matrix] * n]), "panels") for n in (2, 1))
    x = torch.linspace(-120, 120, 32).repeat(2, 1)
    x[1] /= 30
    got = experts(x, torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), *groups, SILU)  # type: ignore[arg-type]
    want = torch.nn.functional.silu(x.double()) * x.double()
    assert (got - want).abs().le(3e-7 * want.abs() + 1e-30).all()


def call(**changed: Any) -> Tensor:
    groups = layer((Precision(3, 32), FULL, Precision(4, 64, True)), 64, 64)
    draw = torch.Generator().manual_seed(0)
    x, index, weights = torch.randn(5, 64), torch.randint(0, 3, (5, 2), generator=draw), torch.rand(5, 2)
    parts = [(g.qweight, g.scales, g.zeros, g.layout.table.clone()) for g in groups]
    biases = biases_of(groups)
    names = ("gate_up", "gate_up_scales", "gate_up_zeros", "gate_up_table", "down", "down_scales", "down_zeros",
             "down_table")  # fmt: skip
    given = {"x": x, "index": index, "weights": weights, **dict(zip(names, parts[0] + parts[1], strict=True)),
             "gate_up_bias": biases[0], "down_bias": biases[1], "interleaved": False, "gate": (1.0, 7.0, 0.0),
             "digits": 3}  # fmt: skip
    for name, change in changed.items():
        given[name] = change(given[name]) if callable(change) else change
    result: Tensor = torch.ops.mopeq.experts(*given.values())
    return result


def cell(expert: int, column: int, value: int) -> Any:
    def change(table: Tensor) -> Tensor:
        table[expert, 0, column] = value
        return table

    return change


NO_BIAS = {"gate_up_bias": None, "down_bias": None}
REFUSED = {
    "float64": ({"x": lambda t: t.double()}, "expected float32, bfloat16 or float16"),
    "other hidden size": ({"x": lambda t: t[:, :32]}, "expected"),
    "fewer indices": ({"index": lambda t: t[:4]}, r"got index \[4, 2\]; expected \[5, 2\]"),
    "flat index": ({"index": lambda t: t[:, 0]}, "got weights"),
    "int32 index": ({"index": lambda t: t.int()}, "got index as torch.int32"),
    "fewer weights": ({"weights": lambda t: t[:, :1]}, "got weights"),
    "bias of fewer experts": ({"gate_up_bias": lambda t: t[:2]}, r"got gate_up_bias \[2, 128\]; expected \[3, 128\]"),
    "bias of another width": ({"down_bias": lambda t: t[:, :8]}, "got down_bias"),
    "biases of two types": ({"down_bias": lambda t: t.bfloat16()}, "biases of one of these types"),
    "bias with gaps": ({"down_bias": lambda t: t.T.contiguous().T}, "expected contiguous"),
    "fewer experts below": ({"down_table": lambda t: t[:2].contiguous(), **NO_BIAS}, "do not fit"),
    "no experts": ({"down_table": lambda t: t[:0].contiguous(), **NO_BIAS}, "missing"),
    "one matrix above": ({"gate_up_table": lambda t: t[:, :1].contiguous()}, "do not fit"),
    "codes behind": ({"down_table": cell(0, 5, 10**6)}, "outside its buffer"),
    "other inner size": ({"down_table": cell(0, 4, 32)}, "expected"),
    "inner size of one expert": ({"down_table": cell(1, 4, 32)}, "do not fit"),
    "7 bits": ({"gate_up_table": cell(1, 0, 7)}, "a width is not"),
    "no digits": ({"digits": 0}, "number of digits"),
    "a table of rows": ({"down_table": lambda t: t[0]}, "expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    changed, message = REFUSED[case]
    assert call().isfinite().all()
    with pytest.raises(InputError, match=message):
        call(**changed)


def test_the_library_refuses_null_and_plain_matrices() -> None:
    lib = cpu.library()
    assert lib.mopeq_experts(None) == 1
    assert lib.mopeq_experts(ctypes.byref(cpu.ExpertsJob())) == 1
    with pytest.raises(ctypes.ArgumentError):
        lib.mopeq_experts(cpu.ExpertsJob())
    plain = flat([[random_matrix((32, 32), Precision(3, 32))]])
    with pytest.raises(InputError, match="in plain and plain form; expected panels"):
        experts(torch.zeros(1, 32), torch.zeros(1, 1).long(), torch.ones(1, 1), plain, plain, SILU)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_damaged_descriptors_are_refused(data: st.DataObject) -> None:
    values = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-40, 600))

    def damage(tensor: Tensor) -> Tensor:
        tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = data.draw(values)
        return tensor

    names = data.draw(st.lists(st.sampled_from(("gate_up_table", "down_table", "index")), min_size=1, unique=True))
    with contextlib.suppress(InputError):  # anything else, a crash above all, fails
        call(**dict.fromkeys(names, damage))


def test_shapes_without_data_and_compiled() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    groups = layer()
    x, index, weights = routed(5)
    compiled = torch.compile(
        lambda t: experts(t * 2, index, weights, *groups, SILU) + 1, fullgraph=True, backend="eager"
    )
    assert compiled(x).equal(experts(x * 2, index, weights, *groups, SILU) + 1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = experts(torch.empty(5, HIDDEN, dtype=torch.bfloat16), index, weights, *groups, SILU)
    assert (made.shape, made.dtype) == ((5, HIDDEN), torch.bfloat16)
