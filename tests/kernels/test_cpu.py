"""The compiled CPU kernel against the reference kernel in float64, on every instruction set this machine has."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_naive import CODEBOOKS, error, flat, random_matrix
from torch import Tensor

from mopeq import native
from mopeq.errors import InputError
from mopeq.kernels import GroupLayout, PackedGroup, convert, cpu, grouped_linear, linear, naive, select, selected, using
from mopeq.precision import FULL, Precision
from mopeq.qtensor import QTensor, dequantize

needs_library = pytest.mark.skipif(bool(cpu.why_not()), reason="no compiled kernel")
WIDTHS = (2, 3, 4, 5, 6, 8)
# rms(got - want) / rms(want) by digits of the activations; docs/numerics.md
TOLERANCE = {1: 2e-2, 2: 1e-4, 3: 1e-6}


def isas() -> range:
    return range(0 if cpu.why_not() else cpu.library().mopeq_best_isa() + 1)


@pytest.fixture(params=isas(), ids=lambda i: cpu.ISAS[i])
def every_isa(request: pytest.FixtureRequest) -> Iterator[int]:
    lib = cpu.library()
    before = lib.mopeq_isa()
    assert lib.mopeq_use_isa(request.param) == 0
    yield request.param
    lib.mopeq_use_isa(before)


def inputs(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def panels(rows: list[list[QTensor]]) -> PackedGroup:
    return convert(flat(rows), "panels")


def experts(precisions: tuple[Precision, ...], shapes: tuple[tuple[int, int], ...]) -> PackedGroup:
    return panels([[random_matrix(s, p, 5 * e + i) for i, s in enumerate(shapes)] for e, p in enumerate(precisions)])


KINDS = [Precision(b, g, s) for b in WIDTHS for g in (32, 64, 128, -1) for s in (False, True)]
KINDS += [*CODEBOOKS, FULL]


@pytest.mark.usefixtures("every_isa")
@pytest.mark.parametrize("precision", KINDS, ids=str)
def test_every_precision(precision: Precision) -> None:
    """Odd numbers of eights of rows; tokens around the tiles of 1, 2 and 4; 1 to 3 digits."""
    packed = experts((precision,) * 2, ((24, 128), (40, 128)))
    for tokens in (0, 1, 2, 3, 4, 5, 9):
        x, offsets = inputs(tokens, 128, tokens), torch.tensor([0, tokens // 2, tokens])
        want = naive.grouped_linear(x.double(), packed, offsets)
        for digits, tolerance in TOLERANCE.items():
            got = cpu.grouped_linear(x, packed, offsets, digits)
            assert (got.shape, got.dtype) == (want.shape, torch.float32)
            assert tokens == 0 or error(got, want) < tolerance


@pytest.mark.parametrize("coarse", [0, 8])
@pytest.mark.parametrize(
    "precision",
    [*(Precision(b, g, g == 32, hadamard=g == 64) for b in WIDTHS for g in (32, 64, -1)), *CODEBOOKS],
    ids=str,
)
def test_many_tokens_give_the_bits_of_few(precision: Precision, coarse: int) -> None:
    """Panels that are unpacked for 96 tokens and more: in pairs, one left over and half a one; more than one chunk."""
    packed = experts((precision,), ((56, 1152),))
    x = inputs(96 + 7, 1152).bfloat16()  # tiles of 4, 2 and 1 tokens
    table = packed.layout.table

    def product(rows: Tensor) -> Tensor:
        out: Tensor = torch.ops.mopeq.grouped_linear.default(
            rows, packed.qweight, packed.scales, packed.zeros, table, None, 56, 2, coarse
        )
        return out

    assert product(x).equal(torch.cat([product(part) for part in x.split(5)]))


@pytest.mark.usefixtures("every_isa")
@pytest.mark.parametrize("precision", [*(Precision(b, 64) for b in WIDTHS), CODEBOOKS[1]], ids=str)
def test_outliers_cost_what_they_must(precision: Precision) -> None:
    """Within half a step of each block's digits times the weights' magnitudes, whatever the activations."""
    packed = experts((precision,), ((40, 256),))
    (matrix,) = packed.matrices(0)
    weight = dequantize(matrix).double()
    x = inputs(8, 256)
    x[:, ::13] *= 30
    x[:4, 7] *= 1000
    for digits in TOLERANCE:
        step = x.view(8, 8, 32).abs().amax(-1).double() / (127 * 128 ** (digits - 1))
        bound = step @ weight.abs().view(40, 8, 32).sum(-1).T / 2
        got, want = cpu.grouped_linear(x, packed, None, digits).double(), x.double() @ weight.T
        assert ((got - want).abs() <= bound + 1e-6 * (x.double().abs() @ weight.abs().T)).all()
        assert digits == 3 or (got - want).abs().amax() > 0.01 * bound.amax()  # so that the line above says something


@pytest.mark.usefixtures("every_isa")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_coarse_widths_use_one_digit_of_two(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 2 bits, unless asked otherwise; a wider neighbour in the call keeps all of its digits. float32 has none."""
    packed = experts(tuple(Precision(b, 64, b == 4) for b in WIDTHS), ((24, 256), (40, 256)))
    x, offsets = inputs(6 * 7, 256).to(dtype), torch.arange(7) * 7  # tiles of 4, 2 and 1 tokens
    one, two = (cpu.grouped_linear(x, packed, offsets, digits) for digits in (1, 2))
    for asked in (None, 0, 4, 8):
        cpu._coarse.cache_clear()
        monkeypatch.setenv("MOPEQ_COARSE", "" if asked is None else str(asked))
        got = cpu.grouped_linear(x, packed, offsets)
        for e, bits in enumerate(WIDTHS):
            rows = slice(7 * e, 7 * e + 7)
            if bits > (cpu.COARSE if asked is None else asked):
                assert got[rows].equal(two[rows])
            else:  # the first digit rounds a tie otherwise than a single one
                assert error(got[rows], one[rows].double()) < 4e-3 < error(got[rows], two[rows].double())
        wide = cpu.grouped_linear(x.float(), packed, offsets)
        assert wide.equal(cpu.grouped_linear(x.float(), packed, offsets, 3))
    cpu._coarse.cache_clear()


@pytest.mark.parametrize("asked", ["9", "-1", "two"])
def test_a_bad_coarse_width_is_refused(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu._coarse.cache_clear()
    monkeypatch.setenv("MOPEQ_COARSE", asked)
    with pytest.raises(InputError, match=f"MOPEQ_COARSE is {asked}; expected a width in bits, 0 to 8"):
        cpu.digits_of(torch.bfloat16)
    cpu._coarse.cache_clear()


@pytest.mark.usefixtures("every_isa")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_types_of_activations(dtype: torch.dtype) -> None:
    """The result is the one in float64, rounded to the activations' type: closer to it than the reference kernel."""
    packed = experts((Precision(3, 64), Precision(8, 64), FULL), ((64, 512),))
    x, offsets = inputs(12, 512).to(dtype), torch.tensor([0, 4, 8, 12])
    want = naive.grouped_linear(x.double(), packed, offsets)
    got = cpu.grouped_linear(x, packed, offsets)
    assert got.dtype == dtype
    assert error(got, want) < {torch.bfloat16: 2e-3, torch.float16: 3e-4}[dtype]
    assert error(got, want) <= error(naive.grouped_linear(x, packed, offsets), want)


MIX = (
    FULL,
    *(Precision(b, g, s) for b, (g, s) in zip(WIDTHS, itertools.cycle(((32, False), (-1, True), (64, False))))),
    CODEBOOKS[1],
)


def total(*counts: int) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


COUNTS = [
    (0,) * 8,
    (1, 0, 0, 0, 0, 0, 0, 0),
    (0, 0, 0, 0, 0, 0, 0, 6),
    (0, 0, 17, 0, 0, 0, 0, 0),
    (3, 1, 0, 2, 5, 4, 3, 5),
]


@pytest.mark.usefixtures("every_isa")
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("outside", [(0, 0), (2, 3)], ids=str)
def test_mixed_widths_in_one_call(counts: tuple[int, ...], outside: tuple[int, int]) -> None:
    packed = experts(MIX, ((24, 64), (16, 64)))
    before, after = outside
    offsets = total(*counts) + before
    x = inputs(int(offsets[-1]) + after, 64)
    x[:before], x[int(offsets[-1]) :] = float("nan"), float("nan")
    got = cpu.grouped_linear(x, packed, offsets)
    want = naive.grouped_linear(x.double(), packed, offsets)
    inner = slice(before, int(offsets[-1]))
    assert sum(counts) == 0 or error(got[inner], want[inner]) < 1e-6
    assert not got[:before].any()
    assert not got[int(offsets[-1]) :].any()


@needs_library
def test_the_same_bits_on_every_path() -> None:
    """Instruction sets, threads, tiles and neighbours in the batch change nothing."""
    lib, threads, isa = cpu.library(), torch.get_num_threads(), cpu.library().mopeq_isa()
    packed = experts(MIX, ((152, 1024), (72, 1024)))
    offsets = total(3, 1, 0, 2, 5, 4, 3, 5)
    x = inputs(23, 1024)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            want = cpu.grouped_linear(x.to(dtype), packed, offsets)
            for which in isas():
                lib.mopeq_use_isa(which)
                for count in (1, 2, 3, 7):
                    torch.set_num_threads(count)
                    assert cpu.grouped_linear(x.to(dtype), packed, offsets).equal(want)
            for row in range(23):
                expert = int(torch.searchsorted(offsets, torch.tensor(row), right=True)) - 1
                alone = cpu.grouped_linear(x[row : row + 1].to(dtype), packed, (torch.arange(9) > expert).long())
                assert alone[0].equal(want[row])
    finally:
        torch.set_num_threads(threads)
        lib.mopeq_use_isa(isa)


@needs_library
def test_uninitialised_memory_is_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = experts(MIX, ((24, 64),))
    x, offsets = inputs(25, 64), total(3, 1, 0, 2, 5, 4, 3, 5)
    want = cpu.grouped_linear(x, packed, offsets)
    monkeypatch.setattr(torch, "empty", lambda *shape, **kwargs: torch.full(shape, float("nan"), **kwargs))
    assert cpu.grouped_linear(x, packed, offsets).equal(want)


@pytest.mark.usefixtures("every_isa")
def test_zeros_infinities_and_small_numbers() -> None:
    packed = experts((Precision(3, 32), FULL), ((16, 64),))
    x = inputs(6, 64)
    x[0] = 0
    x[1, 5] = float("inf")
    x[2, 40] = float("nan")
    x[3] *= 1e-20
    x[4] *= 1e20
    for offsets in (total(6, 0), total(0, 6)):
        got = cpu.grouped_linear(x, packed, offsets)
        want = naive.grouped_linear(x.double(), packed, offsets)
        assert not got[0].any()
        assert not torch.isfinite(got[1]).any()
        assert torch.isnan(got[2]).all()
        for row in (3, 4, 5):
            assert error(got[row], want[row]) < 1e-6


@needs_library
@pytest.mark.parametrize("value", [float("inf"), 6e-5, 5.9e-8, 0.0, 65504.0])
def test_scales_at_the_ends_of_float16(value: float) -> None:
    packed = flat([[random_matrix((16, 64), Precision(4, 32))]])
    assert packed.scales is not None
    packed.scales.fill_(value)
    packed = convert(packed, "panels")
    x = inputs(1, 64).abs()
    results = []
    for which in isas():
        cpu.library().mopeq_use_isa(which)
        results.append(cpu.grouped_linear(x, packed))
    want = naive.grouped_linear(x.double(), packed, torch.tensor([0, 1]))
    assert all(r.nan_to_num(nan=7.0).equal(results[0].nan_to_num(nan=7.0)) for r in results)
    if value not in (0.0, float("inf")):
        assert error(results[0], want) < 1e-6


@needs_library
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_damaged_descriptors_are_refused(data: st.DataObject) -> None:
    """A table or offsets changed anywhere either give a sentence, or describe something that lies in the buffers."""
    packed = experts((Precision(3, 32), Precision(4, 64, True)), ((24, 64), (8, 64)))
    table, offsets = packed.layout.table.clone(), torch.tensor([0, 2, 5])
    values = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-40, 600))
    for _ in range(data.draw(st.integers(1, 3))):
        which = data.draw(st.sampled_from((table.view(-1), table.view(-1), offsets)))
        which[data.draw(st.integers(0, len(which) - 1))] = data.draw(values)
    arguments = (packed.qweight, packed.scales, packed.zeros, table, offsets, 32, 3)
    with contextlib.suppress(InputError):  # anything else, a crash above all, fails
        torch.ops.mopeq.grouped_linear(inputs(5, 64), *arguments)


def call(**changed: Any) -> Tensor:
    packed = experts((Precision(3, 32), FULL), ((16, 64),))
    given = {"x": inputs(5, 64), "qweight": packed.qweight, "scales": packed.scales, "zeros": packed.zeros,
             "table": packed.layout.table.clone(), "offsets": torch.tensor([0, 2, 5]), "out_features": 16,
             "digits": 3, "coarse": 0}  # fmt: skip
    for name, change in changed.items():
        given[name] = change(given[name]) if callable(change) else change
    result: Tensor = torch.ops.mopeq.grouped_linear(*given.values())
    return result


def cell(column: int, value: int, expert: int = 0) -> Any:
    def change(table: Tensor) -> Tensor:
        table[expert, 0, column] = value
        return table

    return change


REFUSED = {
    "7 bits": ({"table": cell(0, 7)}, "a width is not"),
    "codebook of 3 bits": ({"table": cell(2, 2)}, "a codebook is not of 2"),
    "another kind": ({"table": cell(2, 3)}, "a width is not"),
    "group 48": ({"table": cell(1, 48)}, "a group size"),
    "group 0": ({"table": cell(1, 0)}, "a group size"),
    "12 rows": ({"table": cell(3, 12)}, "do not fit together"),
    "24 rows": ({"table": cell(3, 24)}, "outside its buffer"),
    "other inputs": ({"table": cell(4, 32)}, "do not fit together"),
    "codes before": ({"table": cell(5, -1)}, "outside its buffer"),
    "codes behind": ({"table": cell(5, 10**6)}, "outside its buffer"),
    "scales behind": ({"table": cell(6, 1)}, "outside its buffer"),
    "zeros behind": ({"table": cell(7, 1)}, "outside its buffer"),
    "16 bits behind": ({"table": cell(5, 10**6, 1)}, "outside its buffer"),
    "16 bits between bytes": ({"table": cell(5, 3, 1)}, "outside its buffer"),
    "no scales": ({"scales": None}, "outside its buffer"),
    "no zeros": ({"zeros": None}, "outside its buffer"),
    "offsets decrease": ({"offsets": torch.tensor([0, 3, 2])}, "offsets decrease"),
    "offsets below": ({"offsets": torch.tensor([-1, 3, 5])}, "offsets decrease"),
    "offsets beyond": ({"offsets": torch.tensor([0, 3, 6])}, "offsets decrease"),
    "no offsets": ({"offsets": None}, "a buffer is missing"),
    "too few offsets": ({"offsets": torch.tensor([0, 5])}, "2 offsets for 2 experts; expected 3"),
    "other outputs": ({"out_features": 24}, "do not fit together"),
    "no outputs": ({"out_features": 0}, "expected float32"),
    "no digits": ({"digits": 0}, "number of digits"),
    "4 digits": ({"digits": 4}, "number of digits"),
    "coarse without a second digit": ({"coarse": 2}, "number of digits"),
    "coarse beyond 8 bits": ({"digits": 2, "coarse": 9}, "number of digits"),
    "40 inputs": ({"x": torch.zeros(5, 40)}, "do not fit together"),
    "float64": ({"x": torch.zeros(5, 64, dtype=torch.float64)}, "expected float32, bfloat16 or float16"),
    "three axes": ({"x": torch.zeros(5, 1, 64)}, "expected float32"),
    "codes of another type": ({"qweight": lambda t: t.view(torch.int8)}, "got qweight as torch.int8"),
    "codes with gaps": ({"qweight": lambda t: t[::2]}, "expected contiguous torch.uint8"),
    "int32 offsets": ({"offsets": torch.tensor([0, 2, 5]).int()}, "got offsets as torch.int32"),
}  # fmt: skip


@needs_library
@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    changed, message = REFUSED[case]
    assert call().isfinite().all()
    with pytest.raises(InputError, match=message):
        call(**changed)


@needs_library
def test_the_library_refuses_null_and_alignment() -> None:
    lib, x = cpu.library(), torch.zeros(65)
    assert lib.mopeq_grouped_linear(None) == 1
    job = cpu._Job(rows=1, inputs=32, experts=1, per_expert=1, out_features=8, digits=3, threads=1)
    assert lib.mopeq_grouped_linear(ctypes.byref(job)) == 1
    job.out = job.codes = job.matrices = x.data_ptr()
    job.x = x.data_ptr() + 2
    assert lib.mopeq_grouped_linear(ctypes.byref(job)) == 7
    assert lib.mopeq_repack_codes(x.data_ptr(), x.data_ptr() + 128, 8, 32, 7, 1, 1) == 3
    assert lib.mopeq_repack_codes(x.data_ptr(), x.data_ptr() + 128, 12, 32, 4, 1, 1) == 2
    assert lib.mopeq_repack_scales(None, x.data_ptr(), 8, 1, 1) == 1
    assert lib.mopeq_use_isa(99) != 0
    with pytest.raises(InputError, match="in plain form; expected panels"):
        cpu.grouped_linear(torch.zeros(1, 64), flat([[random_matrix((8, 64), Precision(3, 32))]]))


@needs_library
def test_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOPEQ_KERNEL", raising=False)
    assert selected().name == "cpu"
    assert selected().isa in cpu.ISAS
    packed, x = experts((Precision(3, 32),), ((16, 64),)), inputs(3, 64)
    calls: list[int] = []
    real = cpu.grouped_linear
    monkeypatch.setattr(cpu, "grouped_linear", lambda *args: calls.append(1) or real(*args))
    fast = grouped_linear(x, packed, torch.tensor([0, 3]))
    assert linear(x.view(3, 1, 64), packed).equal(fast.view(3, 1, 16))
    assert len(calls) == 2
    with using("naive") as chosen:
        assert chosen.name == "naive"
        assert error(linear(x, packed), fast) < 1e-6
    monkeypatch.setenv("MOPEQ_KERNEL", "naive")
    assert selected().reason == "asked for"
    linear(x, packed)
    monkeypatch.setenv("MOPEQ_KERNEL", "auto")
    assert selected().name == "cpu"
    linear(x.double(), packed)
    weighed = linear(x.clone().requires_grad_(), packed)
    weighed.sum().backward()  # through the reference kernel
    assert len(calls) == 2
    with torch.no_grad():
        linear(x.clone().requires_grad_(), packed)
    assert len(calls) == 3
    monkeypatch.setenv("MOPEQ_KERNEL", "fast")
    with pytest.raises(InputError, match="MOPEQ_KERNEL is fast; expected auto, cpu, naive"):
        selected()


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("MOPEQ_KERNEL", raising=False)
    monkeypatch.setattr(native, "_open", native._open.__wrapped__)  # not the remembered one
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libmopeq_cpu.so")
    select._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "mopeq"):
        assert (selected().name, selected().isa) == ("naive", None)
        assert "was not built when mopeq was installed" in selected().reason
    assert len(caplog.records) == 1
    x = inputs(3, 64)
    packed = flat([[random_matrix((16, 64), Precision(3, 32))]])
    assert linear(x, packed).equal(naive.linear(x, packed.matrices(0)[0]))
    with pytest.raises(InputError, match="mopeq has no compiled CPU kernel"), using("cpu"):
        pass
    (tmp_path / "libmopeq_cpu.so").write_bytes(b"no library")
    assert "does not load" in cpu.why_not()


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), *sys.path])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False,
                          env={**os.environ, "PYTHONPATH": path, **variables})  # fmt: skip


@needs_library
@pytest.mark.parametrize("isa", [*(cpu.ISAS[i] for i in isas()), "avx9000"])
def test_environment_forces_the_instruction_set(isa: str) -> None:
    done = python("from mopeq.kernels import selected; print(selected().isa)", MOPEQ_CPU_ISA=isa)
    if isa == "avx9000":
        assert "MOPEQ_CPU_ISA is avx9000; expected one of portable" in done.stderr
    else:
        assert done.stdout.strip() == isa


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_after_fork() -> None:
    """A child of a process whose pool has run computes the same, on one thread, and does not hang."""
    code = """
import os, torch
from test_cpu import experts, inputs, cpu, Precision
torch.set_num_threads(2)
packed, x = experts((Precision(4, 64),), ((512, 1024),)), inputs(8, 1024)
want = cpu.grouped_linear(x, packed)
child = os.fork()
if child == 0:
    os._exit(0 if cpu.grouped_linear(x, packed).equal(want) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = python(code)
    assert done.stdout.strip() == "0", done.stderr


@needs_library
def test_two_python_threads_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    packed, x = experts(MIX, ((152, 256),)), inputs(23, 256)
    offsets = total(3, 1, 0, 2, 5, 4, 3, 5)
    want = cpu.grouped_linear(x, packed, offsets)
    with ThreadPoolExecutor(4) as pool:
        assert all(r.equal(want) for r in pool.map(lambda _: cpu.grouped_linear(x, packed, offsets), range(40)))


@needs_library
def test_own_threads_where_torch_offers_none() -> None:
    packed, x = experts(MIX, ((152, 1024),)), inputs(23, 1024)
    offsets, lib = total(3, 1, 0, 2, 5, 4, 3, 5), cpu.library()
    want = cpu.grouped_linear(x, packed, offsets)
    threads = torch.get_num_threads()
    lib.mopeq_set_parallel_for(None)
    torch.set_num_threads(3)
    try:
        assert cpu.grouped_linear(x, packed, offsets).equal(want)
    finally:
        torch.set_num_threads(threads)
        lib.mopeq_set_parallel_for(native._torch_pool())


@needs_library
def test_shapes_without_data() -> None:
    """For torch.compile and meta tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    packed = experts((Precision(3, 32),), ((16, 64),))
    table = packed.layout.table
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = torch.ops.mopeq.grouped_linear(
            torch.empty(5, 64, dtype=torch.bfloat16), packed.qweight, packed.scales, packed.zeros, table, None, 16, 2
        )
    assert (made.shape, made.dtype) == ((5, 16), torch.bfloat16)
    x = inputs(4, 64)
    assert selected().name == "cpu"  # what loading a model asks before
    compiled = torch.compile(lambda t: linear(t * 2, packed) + 1, fullgraph=True, backend="eager")
    assert compiled(x).equal(linear(x * 2, packed) + 1)


def test_layouts_without_panels() -> None:
    assert not GroupLayout((Precision(3, -1),), ((8, 40),)).has_panels
    assert GroupLayout((Precision(3, -1), FULL), ((8, 96),)).has_panels
