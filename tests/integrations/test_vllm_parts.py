"""Packed matrices cut for vLLM's workers, without vLLM."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mopeq.errors import CheckpointError, InputError
from mopeq.integrations.vllm.parts import Cut, Filling, cut_part
from mopeq.kernels import GroupLayout
from mopeq.precision import FULL, Precision
from mopeq.qtensor import QTensor, dequantize
from packing import packed_matrix

KINDS = [FULL, *(Precision(bits, size, bits == 4) for bits in (2, 3, 4, 5, 6, 8) for size in (32, -1))]


def stored(q: QTensor) -> dict[str, torch.Tensor]:
    parts = {"qweight": q.qweight, "scales": q.scales, "zeros": q.zeros}
    return {name: t for name, t in parts.items() if t is not None and t.numel()}


@pytest.mark.parametrize("precision", KINDS, ids=str)
@pytest.mark.parametrize("cut", [Cut((0, 48), (0, 128)), Cut((8, 24), (0, 128)), Cut((0, 48), (64, 128))], ids=str)
def test_a_cut_is_that_of_the_dense_matrix(precision: Precision, cut: Cut) -> None:
    q = packed_matrix(torch.randn(48, 128, generator=torch.Generator().manual_seed(0)), precision)
    cut.check("w", q.shape, precision)
    pieces = {part: cut_part(t, part, precision, cut) for part, t in stored(q).items()}
    held = QTensor(
        pieces["qweight"].contiguous(), pieces.get("scales", q.scales).contiguous(), pieces.get("zeros"), cut.shape,
        precision,
    )  # fmt: skip
    assert torch.equal(dequantize(held), dequantize(q)[slice(*cut.rows), slice(*cut.inputs)])


@pytest.mark.parametrize(
    ("precision", "cut"),
    [
        (Precision(4, 64), Cut((0, 48), (32, 64))),
        (Precision(4, -1), Cut((0, 48), (0, 20))),
        (Precision(3, 32), Cut((12, 24), (0, 128))),
    ],
)
def test_a_cut_through_a_group_or_a_byte_is_refused(precision: Precision, cut: Cut) -> None:
    with pytest.raises(InputError, match="enable-expert-parallel"):
        cut.check("w", (48, 128), precision)


def filling(precisions: tuple[Precision, ...]) -> tuple[Filling, nn.Module]:
    layer = nn.Module()
    return Filling("layer", layer, "w13_", GroupLayout(precisions, ((24, 64), (24, 64)))), layer


def test_filled_buffers_run() -> None:
    precisions = (Precision(3, 32), FULL)
    made, layer = filling(precisions)
    assert [name for name, _ in layer.named_parameters()] == ["w13_qweight", "w13_scales", "w13_zeros"]
    cut, dense = Cut((24, 48), (0, 64)), []
    for expert, precision in enumerate(precisions):
        for matrix in range(2):
            q = packed_matrix(torch.randn(48, 64), precision)
            dense.append(dequantize(q)[24:])
            for part, tensor in stored(q).items():
                made.put(expert, matrix, part, tensor, cut, (48, 64))
    x = torch.randn(5, 64)
    got = made.finish(torch.float32)(x, torch.tensor([0, 2, 5]))
    expected = torch.cat([x[:2] @ torch.cat(dense[:2]).T, x[2:] @ torch.cat(dense[2:]).T])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_what_is_missing_or_of_another_shape_is_an_error() -> None:
    made, _ = filling((Precision(3, 32),))
    cut = Cut((0, 24), (0, 64))
    with pytest.raises(CheckpointError, match="asks for"):
        made.put(0, 0, "qweight", torch.zeros(24, 32, dtype=torch.uint8), cut, (24, 64))
    made.put(0, 0, "qweight", torch.zeros(24, 24, dtype=torch.uint8), cut, (24, 64))
    with pytest.raises(CheckpointError, match="5 packed tensors are missing"):
        made.finish(torch.float32)
