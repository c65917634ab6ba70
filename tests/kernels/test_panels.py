"""Panels: their order by hand, and the library's repacking against the one in torch."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_naive import CODEBOOKS, flat, random_matrix
from torch import Tensor

from mopeq.errors import InputError
from mopeq.kernels import GroupLayout, PackedGroup, convert, cpu
from mopeq.kernels.panels import from_panels, to_panels
from mopeq.precision import FULL, Precision
from mopeq.qtensor import QTensor, unpack

WIDTHS = (2, 3, 4, 5, 6, 8)
compiled = pytest.mark.skipif(bool(cpu.why_not()), reason="no compiled kernel")


def code(lines: Tensor, bits: int, row: int, k: int, height: int) -> int:
    """One code of a block of a panel, bit by bit as panels.py says: a line is 4 bytes a row."""
    chunk, byte = k // 4, 4 * row + k % 4
    line = [int(lines[n * height * 4 + byte]) for n in range(bits)]
    if bits == 8:
        return line[chunk]
    if bits == 2:
        return line[chunk // 4] >> 2 * (chunk % 4) & 3
    if bits == 3:
        rest = sum((line[n] >> 6) << 2 * n for n in range(3))
        return [line[0], line[0] >> 3, line[1], line[1] >> 3, line[2], line[2] >> 3, rest, rest >> 3][chunk] & 7
    low = line[chunk // 2] >> 4 * (chunk % 2) & 15
    if bits == 5:
        low += 16 * (line[4] >> chunk & 1)
    if bits == 6:
        low += 16 * (line[4 + chunk // 4] >> 2 * (chunk % 4) & 3)
    return low


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("rows", [8, 16, 40])
def test_order_of_codes(bits: int, rows: int) -> None:
    q = random_matrix((rows, 64), Precision(bits, 32), bits)
    turned, want = to_panels(q).qweight.flatten(), unpack(q).codes
    at = 0
    for first in range(0, rows, 16):
        height = min(16, rows - first)
        for block in range(2):
            lines = turned[at : at + height * 4 * bits]
            at += len(lines)
            for row in range(height):
                for k in range(32):
                    assert code(lines, bits, row, k, height) == int(want[first + row, 32 * block + k])
    assert at == turned.numel()


def test_order_of_codes_of_a_codebook() -> None:
    """Line n, byte 4r+j: in its low bits the code of inputs 16n+j and 16n+4+j of row r, in its high those 8 further."""
    q = random_matrix((24, 128), CODEBOOKS[0])
    turned, codes = to_panels(q).qweight.flatten(), unpack(q).codes
    for row, block, n, j in itertools.product(range(24), range(4), range(2), range(4)):
        first, height = row // 16 * 16, 16 if row < 16 else 8
        byte = int(turned[first * 32 + block * height * 8 + n * height * 4 + 4 * (row - first) + j])
        assert byte == int(codes[row, 16 * block + 8 * n + j]) | int(codes[row, 16 * block + 8 * n + 4 + j]) << 4


def test_order_of_scales_and_zero_points() -> None:
    q = random_matrix((24, 96), Precision(3, 32))
    turned = to_panels(q)
    scales, zeros = turned.scales.flatten().tolist(), turned.zeros
    assert scales == [float(q.scales[r, g]) for rows in (range(16), range(16, 24)) for g in range(3) for r in rows]
    assert zeros is not None
    assert q.zeros is not None
    eights = q.zeros.view(3, 3, 3)  # (groups, eights of rows, bytes)
    want = [eights[g, e] for pair in ((0, 1), (2,)) for g in range(3) for e in pair]
    assert zeros.flatten().equal(torch.cat(want))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(8, 32), (40, 96), (64, 128)], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
def test_there_and_back(bits: int, shape: tuple[int, int], symmetric: bool) -> None:
    q = random_matrix(shape, Precision(bits, 32, symmetric))
    again = from_panels(to_panels(q))
    for part in ("qweight", "scales", "zeros"):
        before, after = getattr(q, part), getattr(again, part)
        assert (before is None and after is None) or before.equal(after)


def test_refusal() -> None:
    with pytest.raises(ValueError, match="a matrix 8 x 40 has no panels; expected multiples of 8 and 32"):
        to_panels(random_matrix((8, 40), Precision(3, -1)))


MIXED = (FULL, *(Precision(b, g, s) for b in WIDTHS for g, s in ((32, False), (64, True), (-1, False))), *CODEBOOKS[:2])


def mixed(shapes: tuple[tuple[int, int], ...]) -> list[list[QTensor]]:
    return [[random_matrix(s, p, 9 * e + i) for i, s in enumerate(shapes)] for e, p in enumerate(MIXED)]


@compiled
@pytest.mark.parametrize("shapes", [((40, 64), (24, 64)), ((48, 128),)], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_library_repacks_in_place_as_torch_does(shapes: tuple[tuple[int, int], ...], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows = mixed(shapes)
        packed = flat(rows)
        places = [t.data_ptr() for t in (packed.qweight, packed.scales, packed.zeros) if t is not None]
        original = packed.qweight.clone()
        turned = convert(packed, "panels")
        assert [t.data_ptr() for t in (turned.qweight, turned.scales, turned.zeros) if t is not None] == places
        for expert, row in enumerate(rows):
            for got, plain, q in zip(turned.stored(expert), turned.matrices(expert), row, strict=True):
                want = to_panels(q)
                assert got.qweight.equal(want.qweight)
                assert got.scales.equal(want.scales)
                assert plain.qweight.equal(q.qweight)
                assert plain.scales.equal(q.scales)
                if q.zeros is not None:
                    assert got.zeros is not None
                    assert want.zeros is not None
                    assert plain.zeros is not None
                    assert got.zeros.equal(want.zeros)
                    assert plain.zeros.equal(q.zeros)
        assert convert(turned, "panels") is turned
        back = convert(turned, "plain")
        assert back.form == "plain"
        assert back.qweight.equal(original)
    finally:
        torch.set_num_threads(before)


@compiled
def test_inputs_that_have_no_panels() -> None:
    packed = flat([[random_matrix((8, 40), Precision(3, -1))]])
    assert not packed.layout.has_panels
    with pytest.raises(InputError, match="rows of 40 inputs have no panels; expected a multiple of 32"):
        convert(packed, "panels")


def test_table() -> None:
    """Eight numbers a matrix; places count elements of the flat buffers."""
    layout = GroupLayout((Precision(2, 32), FULL, Precision(3, -1, True)), ((8, 64), (16, 64)))
    assert layout.table[0].tolist() == [[2, 32, 0, 8, 64, 0, 0, 0], [2, 32, 0, 16, 64, 128, 16, 4]]
    assert layout.table[1].tolist() == [[16, 64, 1, 8, 64, 384, 48, 12], [16, 64, 1, 16, 64, 384 + 1024, 48, 12]]
    assert layout.table[2].tolist() == [[3, 64, 1, 8, 64, 3456, 48, 12], [3, 64, 1, 16, 64, 3456 + 192, 56, 12]]
    for part, column in (("qweight", 5), ("scales", 6), ("zeros", 7)):
        assert tuple(layout.table[:, 0, column].tolist()) == layout.offsets[part][:3]


def test_panels_are_only_a_form() -> None:
    q = random_matrix((24, 64), Precision(3, 32))
    packed = flat([[q]])
    turned = PackedGroup(packed.layout, *(getattr(to_panels(q), p).flatten() for p in ("qweight", "scales", "zeros")),
                         form="panels")  # fmt: skip
    (matrix,) = turned.matrices(0)
    assert matrix.qweight.equal(q.qweight)
