"""Packing against numpy and Python integers, and the reference numerics against a formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mopeq.precision import BITS, FULL, GROUP_SIZES, Precision
from mopeq.qtensor import Codes, dequantize, pack, pack_bits, pack_full, packed_shapes, unpack, unpack_bits

WIDTHS = [b for b in BITS if b < 16]
QUANTIZED = [Precision(b, g, s) for b in WIDTHS for g in GROUP_SIZES for s in (False, True)]


def packed_by_numpy(codes: Tensor, bits: int) -> np.ndarray:
    """Each code as a row of bits, least significant first, the rows joined and read as bytes."""
    planes = (codes.numpy()[..., None] >> np.arange(bits)) & 1
    return np.packbits(planes.reshape(*codes.shape[:-1], -1).astype(np.uint8), axis=-1, bitorder="little")


def packed_by_integers(row: list[int], bits: int) -> bytes:
    return sum(code << (i * bits) for i, code in enumerate(row)).to_bytes(len(row) * bits // 8, "little")


def drawn(precision: Precision, out: int, inp: int, seed: int = 0, batch: tuple[int, ...] = ()) -> Codes:
    g = torch.Generator().manual_seed(seed)
    shape = (*batch, out, precision.group_count(inp))
    codes = torch.randint(0, precision.levels, (*batch, out, inp), generator=g).to(torch.uint8)
    scales = (torch.rand(shape, generator=g) * 0.1 + 1e-3).half()
    zeros = torch.randint(0, precision.levels, shape, generator=g).to(torch.uint8)
    return Codes(codes, scales, None if precision.symmetric else zeros, precision)


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (2, [0, 1, 2, 3, 3, 2, 1, 0], "e41b"),
        (3, [0, 1, 2, 3, 4, 5, 6, 7], "88c6fa"),
        (4, [0, 1, 2, 3, 4, 5, 14, 15], "103254fe"),
        (5, [0, 1, 2, 3, 28, 29, 30, 31], "2088c1bbff"),
        (6, [0, 1, 2, 3, 60, 61, 62, 63], "40200c7cefff"),
        (8, [0, 1, 2, 3, 252, 253, 254, 255], "00010203fcfdfeff"),
    ],
)
def test_golden_bytes(bits: int, codes: list[int], expected: str) -> None:
    assert packed_by_integers(codes, bits).hex() == expected
    packed = pack_bits(torch.tensor([codes], dtype=torch.uint8), bits)
    assert packed.dtype == torch.uint8
    assert bytes(packed[0].tolist()).hex() == expected
    assert unpack_bits(packed, bits).tolist() == [codes]


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(WIDTHS), st.integers(1, 9), st.integers(1, 3), st.data())
def test_packing_equals_numpy_and_integers(bits: int, eights: int, rows: int, data: st.DataObject) -> None:
    code = st.integers(0, 2**bits - 1)
    row = st.lists(code, min_size=8 * eights, max_size=8 * eights)
    values = data.draw(st.lists(row, min_size=rows, max_size=rows))
    codes = torch.tensor(values, dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.numpy().tolist() == packed_by_numpy(codes, bits).tolist()
    assert [bytes(r.tolist()) for r in packed] == [packed_by_integers(r, bits) for r in values]
    assert torch.equal(unpack_bits(packed, bits), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_rows_must_fill_bytes(bits: int) -> None:
    with pytest.raises(ValueError, match="expected a multiple of 8"):
        pack_bits(torch.zeros(2, 12, dtype=torch.uint8), bits)


@pytest.mark.parametrize("precision", QUANTIZED, ids=str)
def test_pack_and_unpack_are_inverse(precision: Precision) -> None:
    codes = drawn(precision, 16, 256, seed=precision.bits)
    packed = pack(codes)
    assert packed.shape == (16, 256)
    assert packed.nbytes == precision.nbytes(16, 256)
    back = unpack(packed)
    assert torch.equal(back.codes, codes.codes)
    assert torch.equal(back.scales, codes.scales)
    assert (back.zeros is None) == precision.symmetric
    if codes.zeros is not None and back.zeros is not None:
        assert torch.equal(back.zeros, codes.zeros)
    tensors = {"qweight": packed.qweight, "scales": packed.scales, "zeros": packed.zeros}
    found = {k: (tuple(t.shape), t.dtype) for k, t in tensors.items() if t is not None}
    assert found == packed_shapes((16, 256), precision)
    assert all(t.is_contiguous() for t in tensors.values() if t is not None)


@pytest.mark.parametrize("precision", QUANTIZED, ids=str)
def test_dequantized_values(precision: Precision) -> None:
    codes = drawn(precision, 8, 128, seed=7)
    scales, zeros = codes.scales.double().numpy(), codes.zeros
    size = 128 // scales.shape[1]
    expected = np.empty((8, 128))
    for row in range(8):
        for column in range(128):
            group = column // size
            zero = 2 ** (precision.bits - 1) if zeros is None else int(zeros[row, group])
            expected[row, column] = (int(codes.codes[row, column]) - zero) * scales[row, group]
    got = dequantize(codes)
    assert got.dtype == torch.float32
    assert np.array_equal(got.numpy(), expected.astype(np.float32))
    assert torch.equal(dequantize(pack(codes)), got)
    assert torch.equal(dequantize(codes, torch.bfloat16), got.to(torch.bfloat16))


def test_one_zero_point_of_every_row_shares_a_byte_row() -> None:
    precision = Precision(4, 32)
    codes = drawn(precision, 8, 64, seed=3)
    zeros = pack(codes).zeros
    assert zeros is not None
    assert codes.zeros is not None
    assert zeros.shape == (2, 4)
    assert bytes(zeros[1].tolist()) == packed_by_integers(codes.zeros[:, 1].tolist(), 4)


def test_a_batch_dequantizes_like_its_members() -> None:
    for precision in (Precision(3, 32), Precision(5, -1, True)):
        batch = drawn(precision, 8, 64, batch=(3,))
        whole = dequantize(batch)
        for i in range(3):
            assert torch.equal(whole[i], dequantize(batch[i]))


def test_sixteen_bits_are_bfloat16() -> None:
    weight = torch.tensor([[1.0, -2.5, 0.0], [3.14159, 1e-20, -1e20]])
    packed = pack_full(weight)
    assert packed.precision == FULL
    assert packed.nbytes == FULL.nbytes(2, 3) == 12
    assert torch.equal(dequantize(packed), weight.bfloat16().float())
    assert bytes(packed.qweight[0].tolist()).hex() == "803f20c00000"
    assert packed_shapes((2, 3), FULL) == {"qweight": ((2, 6), torch.uint8)}
