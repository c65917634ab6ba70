"""The reference kernel against dense products in float64, and the layout of flat buffers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mopeq.kernels import GroupLayout, PackedGroup, naive
from mopeq.kernels.layout import PARTS
from mopeq.precision import FULL, Precision
from mopeq.qtensor import Codes, QTensor, dequantize, pack, pack_full

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
ALL = [Precision(b, g, s) for b in (2, 3, 4, 5, 6, 8) for g in (32, -1) for s in (False, True)] + [FULL]
CODEBOOKS = [Precision(2, g, codebook=True) for g in (32, 64, 128, -1)]


def error(got: Tensor, want: Tensor) -> float:
    """rms(got - want) / rms(want)."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def random_matrix(shape: tuple[int, int], precision: Precision, seed: int = 0) -> QTensor:
    draw = torch.Generator().manual_seed(seed)
    if precision == FULL:
        return pack_full(torch.randn(shape, generator=draw))
    groups = precision.group_count(shape[1])
    stored = (shape[0], shape[1] // precision.weights_per_code)
    codes = torch.randint(0, precision.levels, stored, generator=draw, dtype=torch.uint8)
    scales = (torch.rand(shape[0], groups, generator=draw) + 0.1).half()
    zeros = torch.randint(0, precision.levels, (shape[0], groups), generator=draw, dtype=torch.uint8)
    return pack(Codes(codes, scales, None if precision.symmetric else zeros, precision))


def flat(matrices: list[list[QTensor]]) -> PackedGroup:
    """One buffer a part, expert after expert, written without GroupLayout's offsets."""
    layout = GroupLayout(tuple(row[0].precision for row in matrices), tuple(q.shape for q in matrices[0]))
    parts: dict[str, Tensor | None] = {}
    for part, dtype in PARTS.items():
        pieces = [t.flatten() for row in matrices for q in row if (t := getattr(q, part)) is not None]
        joined = torch.cat(pieces) if pieces else torch.empty(0)
        parts[part] = joined.to(dtype) if joined.numel() else None
    assert parts["qweight"] is not None
    return PackedGroup(layout, parts["qweight"], parts["scales"], parts["zeros"])


@pytest.mark.parametrize("precision", ALL, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_linear(precision: Precision, dtype: torch.dtype) -> None:
    q = random_matrix((24, 64), precision)
    x = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = naive.linear(x, q)
    assert (got.shape, got.dtype) == ((5, 3, 24), dtype)
    assert error(got, x.double() @ dequantize(q).double().T) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "precision", [Precision(3, 32), Precision(5, -1), Precision(8, 32, True), CODEBOOKS[1], FULL], ids=str
)
@pytest.mark.parametrize("block", [1, 64 * 8, 64 * 17])
def test_blocks_of_rows_change_nothing(precision: Precision, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q = random_matrix((40, 64), precision)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    whole = naive.linear(x, q)
    monkeypatch.setattr(naive, "ROW_BLOCK", block)
    seen: list[int] = []
    original = naive.dequantize

    def watched(part: QTensor, dtype: torch.dtype) -> Tensor:
        seen.append(part.shape[0])
        return original(part, dtype)

    monkeypatch.setattr(naive, "dequantize", watched)
    assert error(naive.linear(x, q), whole) < 1e-6
    assert seen == {1: [8] * 5, 512: [8] * 5, 1088: [16, 16, 8]}[block]


def test_layout_offsets_by_hand() -> None:
    layout = GroupLayout((Precision(2, 32), FULL, Precision(3, -1, True)), ((8, 32), (8, 32)))
    assert layout.offsets == {
        "qweight": (0, 2 * 8 * 8, 2 * 8 * 8 + 2 * 8 * 64, 2 * 8 * 8 + 2 * 8 * 64 + 2 * 8 * 12),
        "scales": (0, 16, 16, 32),
        "zeros": (0, 2 * 2, 4, 4),
    }
    assert [layout.size(part) for part in PARTS] == [1344, 32, 4]
    assert layout.parts(1, "scales") == []
    assert GroupLayout((FULL,), ((8, 32),)).size("scales") == 0


def test_matrices_are_views_of_the_buffers() -> None:
    rows = [[random_matrix((16, 32), p, 2 * e + i) for i in range(2)] for e, p in enumerate(ALL[::3])]
    packed = flat(rows)
    for expert, row in enumerate(rows):
        for got, want in zip(packed.matrices(expert), row, strict=True):
            assert got.qweight.untyped_storage().data_ptr() == packed.qweight.untyped_storage().data_ptr()
            assert dequantize(got).equal(dequantize(want))


# tokens of each of five experts: none, one, all to one, many
COUNTS = [(0, 0, 0, 0, 0), (1, 0, 0, 0, 0), (0, 0, 0, 0, 7), (0, 9, 0, 0, 0), (3, 1, 0, 2, 5)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("tail", [0, 3])
def test_grouped_linear(counts: tuple[int, ...], tail: int) -> None:
    rows = [[random_matrix((8, 32), p, 2 * e + i) for i in range(2)] for e, p in enumerate(
        (FULL, Precision(2, 32), Precision(8, -1, True), Precision(3, 32), Precision(5, 32)))]  # fmt: skip
    x = torch.randn(sum(counts) + tail, 32, generator=torch.Generator().manual_seed(3))
    offsets = torch.tensor([0, *counts]).cumsum(0)
    got = naive.grouped_linear(x, flat(rows), offsets)
    assert got.shape == (len(x), 16)
    for expert, row in enumerate(rows):
        begin, end = int(offsets[expert]), int(offsets[expert + 1])
        dense = torch.cat([dequantize(q) for q in row])
        assert torch.allclose(got[begin:end], x[begin:end] @ dense.T, rtol=1e-5, atol=1e-5)
    assert not got[int(offsets[-1]) :].any()


def test_no_part_at_all() -> None:
    """Symmetric experts have no zeros, 16-bit ones no scales either: the buffers do not exist."""
    symmetric = flat([[random_matrix((8, 32), Precision(4, 32, True))]])
    assert symmetric.zeros is None
    full = flat([[random_matrix((8, 32), FULL)]])
    assert full.scales is None
    x = torch.randn(2, 32)
    for packed in (symmetric, full):
        got = naive.grouped_linear(x, packed, torch.tensor([0, 2]))
        assert math.isfinite(float(got.sum()))
