"""Packed linears."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mopeq.precision import Precision
from mopeq.qtensor import dequantize, pack
from mopeq.quantizers import rtn
from mopeq.runtime.linear import QLinear


def packed(precision: Precision, bias: bool = True) -> tuple[QLinear, nn.Linear]:
    torch.manual_seed(0)
    dense = nn.Linear(64, 24, bias=bias)
    q = pack(rtn(dense.weight.data[None], precision)[0])
    made = QLinear(64, 24, precision, dense.bias)
    made.qweight.copy_(q.qweight)
    made.scales.copy_(q.scales)
    if q.zeros is not None:
        assert made.zeros is not None
        made.zeros.copy_(q.zeros)
    dense.weight.data.copy_(dequantize(q))
    return made, dense


@pytest.mark.parametrize("precision", [Precision(2, 32), Precision(3, -1, True), Precision(8, 64)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_equals_the_dense_one(precision: Precision, bias: bool) -> None:
    made, dense = packed(precision, bias)
    x = torch.randn(2, 5, 64)
    assert torch.allclose(made(x), dense(x), rtol=1e-5, atol=1e-6)
    assert torch.allclose(made(x.bfloat16()).float(), dense(x), rtol=0.05, atol=0.05)
    assert made(x.bfloat16()).dtype == torch.bfloat16
    assert ("zeros" in dict(made.named_buffers())) == (not precision.symmetric)
    assert set(made.state_dict()) == {
        "qweight",
        "scales",
        *(["bias"] if bias else []),
        *([] if precision.symmetric else ["zeros"]),
    }


def test_casting_keeps_what_is_packed() -> None:
    made, _ = packed(Precision(4, 32))
    other = copy.deepcopy(made).to(torch.bfloat16)
    assert other.scales.dtype == torch.float16
    assert other.scales.equal(made.scales)
    assert other.bias is not None
    assert other.bias.dtype == torch.bfloat16


def test_bytes_and_name() -> None:
    made, _ = packed(Precision(3, 32), bias=False)
    assert sum(b.numel() * b.element_size() for b in made.buffers()) == Precision(3, 32).nbytes(24, 64)
    assert repr(made) == "QLinear(in_features=64, out_features=24, precision=3g32)"
