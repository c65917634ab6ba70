"""Descriptors of every entry of the compiled library, changed at random: refused, or within the buffers they describe.

Under AddressSanitizer (``make sanitize``) what is read or written beside a buffer ends the run.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryFile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import made as attention_of
from test_cpu_experts import HIDDEN, MIX, SILU, layer
from torch import Tensor

from mopeq import native
from mopeq.errors import InputError
from mopeq.kernels import fill
from mopeq.kernels.attention import Stream
from mopeq.kernels.routing import Moe, Router
from mopeq.quantizers import compiled

pytestmark = pytest.mark.skipif(bool(native.why_not()), reason="no compiled kernel")
ANY = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-40, 600))
SMALL = st.one_of(
    st.integers(0, 5).map(lambda n: 8 * n), st.integers(-3, 70), st.sampled_from((2**31, 2**62, -(2**63)))
)
THREADS = st.integers(-1, 3)


@pytest.fixture(autouse=True, scope="module")
def back() -> Iterator[None]:
    """The instruction set of before."""
    before = native.library().mopeq_isa()
    yield
    native.library().mopeq_use_isa(before)


def room(*sizes: float) -> Tensor:
    """A buffer of their product of bytes; of a single one where they make no sense, for what must be refused."""
    count = int(math.prod(sizes)) if min(sizes) >= 0 else 0
    return torch.zeros(max(1, count) if count < 1 << 22 else 1, dtype=torch.uint8)


def answered(code: int) -> None:
    """Nothing else than 0 and what it says that it returns."""
    assert code == 0 or code in native.FAULTS


def damaged(data: st.DataObject, *tables: Tensor) -> None:
    for _ in range(data.draw(st.integers(0, 3))):
        table = data.draw(st.sampled_from(tables)).view(-1)
        table[data.draw(st.integers(0, len(table) - 1))] = data.draw(ANY)


def attention(data: st.DataObject) -> None:
    one = attention_of(room=data.draw(st.integers(1, 8)))
    damaged(data, *(group.layout.table for group in one._kept[1].values()))
    with contextlib.suppress(InputError):  # anything else, a crash above all, fails
        one(None, data.draw(st.one_of(st.integers(-1, 9), ANY)))


def moe(data: st.DataObject) -> None:
    groups, stream = layer(MIX), Stream(HIDDEN, 16, torch.bfloat16)
    router = Router(torch.randn(len(MIX), HIDDEN).bfloat16(), data.draw(st.one_of(st.integers(-1, 9), ANY)), True, True)
    damaged(data, *(group.layout.table for group in groups))
    with contextlib.suppress(InputError):
        Moe(stream, router, *groups, SILU)()


def filled(data: st.DataObject) -> None:
    size = data.draw(st.one_of(st.integers(0, 4096), st.sampled_from((96, 192, 256, 384, 768))))
    to = room(size)
    with TemporaryFile() as file:
        file.write(bytes(range(256)) * 16)
        file.flush()
        job = fill._Stored(
            file=file.fileno() + data.draw(st.sampled_from((0, 0, 0, 2**32, -(2**40)))),
            begin=data.draw(st.one_of(st.just(0), ANY)), bytes=size, to=to.data_ptr(),
            part=data.draw(st.integers(-1, 4)), rows=data.draw(SMALL), columns=data.draw(SMALL),
            bits=data.draw(st.integers(-1, 9)),
        )  # fmt: skip
        answered(native.library().mopeq_fill(ctypes.byref(job), 1, data.draw(THREADS)))


def grids(data: st.DataObject) -> None:
    kind, bits, refits = (data.draw(st.integers(-1, most)) for most in (3, 9, 2))
    experts, rows, inputs, groups, tries = (data.draw(SMALL) for _ in range(5))
    weight = room(experts, rows, inputs, 4 if kind == 0 else 2)
    scale, zero = (room(experts, rows, groups, 4).fill_(1) for _ in range(2))
    importance, factors, codes = room(experts, inputs, 4), room(tries, 4).fill_(63), room(experts, rows, inputs)
    some = [t.data_ptr() if data.draw(st.booleans()) else None for t in (importance, codes)]
    job = compiled._Job(
        weight.data_ptr(), kind, experts, rows, inputs, groups, bits, data.draw(st.booleans()), some[0],
        factors.data_ptr(), tries, refits, scale.data_ptr(), zero.data_ptr(), data.draw(st.booleans()), some[1],
        data.draw(THREADS),
    )  # fmt: skip
    answered(native.library().mopeq_grids(ctypes.byref(job)))


def codes_repacked(data: st.DataObject) -> None:
    rows, inputs, bits = data.draw(SMALL), data.draw(SMALL), data.draw(st.integers(-1, 9))
    before, after = (room(rows, inputs, max(bits, 0) / 8) for _ in range(2))
    answered(native.library().mopeq_repack_codes(
        before.data_ptr(), after.data_ptr(), rows, inputs, bits, data.draw(st.booleans()), data.draw(THREADS)
    ))  # fmt: skip


def scales_repacked(data: st.DataObject) -> None:
    rows, groups, beside = data.draw(SMALL), data.draw(SMALL), data.draw(st.sampled_from((0, 0, 1)))
    before, after = (room(rows, groups, 2) for _ in range(2))
    answered(native.library().mopeq_repack_scales(
        before.data_ptr() + beside, after.data_ptr(), rows, groups, data.draw(st.booleans())
    ))  # fmt: skip


def zeros_repacked(data: st.DataObject) -> None:
    rows, groups, bits = data.draw(SMALL), data.draw(SMALL), data.draw(st.integers(-1, 9))
    before, after = (room(rows, groups, max(bits, 0) / 8) for _ in range(2))
    answered(native.library().mopeq_repack_zeros(
        before.data_ptr(), after.data_ptr(), rows, groups, bits, data.draw(st.booleans())
    ))  # fmt: skip


def bits_packed(data: st.DataObject) -> None:
    count, bits = data.draw(SMALL.filter(lambda n: n != 2**31)), data.draw(st.integers(-1, 9))  # so many there may be
    codes, to = room(count), room(count, max(bits, 0) / 8)
    answered(native.library().mopeq_pack_bits(codes.data_ptr(), to.data_ptr(), count, bits, data.draw(THREADS)))


def read(data: st.DataObject) -> None:
    size = data.draw(st.integers(-300, 3000))
    buffer = room(size) if data.draw(st.booleans()) else None
    if buffer is not None or size <= 0:
        native.library().mopeq_read(None if buffer is None else buffer.data_ptr(), size, data.draw(THREADS))


ENTRIES: dict[str, Callable[[st.DataObject], None]] = {
    "mopeq_attention": attention,
    "mopeq_moe": moe,
    "mopeq_fill": filled,
    "mopeq_grids": grids,
    "mopeq_repack_codes": codes_repacked,
    "mopeq_repack_scales": scales_repacked,
    "mopeq_repack_zeros": zeros_repacked,
    "mopeq_pack_bits": bits_packed,
    "mopeq_read": read,
}
ELSEWHERE = {"mopeq_grouped_linear", "mopeq_experts"}
"""test_cpu.py and test_cpu_experts.py do so."""
NUMBERS = {"mopeq_abi", "mopeq_best_isa", "mopeq_use_isa", "mopeq_isa", "mopeq_set_parallel_for"}
"""Without buffers."""


@pytest.mark.parametrize("entry", ENTRIES)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_damaged_descriptors(entry: str, data: st.DataObject) -> None:
    library = native.library()
    library.mopeq_use_isa(data.draw(st.integers(0, library.mopeq_best_isa())))
    ENTRIES[entry](data)


def test_no_entry_is_left_out() -> None:
    header = (Path(native.__file__).parent / "kernels" / "csrc" / "mopeq_cpu.h").read_text()
    assert set(re.findall(r"^MOPEQ_API .*?(mopeq_\w+)\(", header, re.MULTILINE)) == {*ENTRIES, *ELSEWHERE, *NUMBERS}
