"""What the call for attention refuses; what it computes, tests/runtime/test_step.py compares with transformers."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from test_naive import flat, random_matrix
from torch import Tensor

from mopeq.errors import InputError
from mopeq.kernels import PackedGroup, attention, convert, cpu
from mopeq.kernels.attention import Attention, Shape, Stream
from mopeq.precision import Precision

pytestmark = pytest.mark.skipif(bool(cpu.why_not()), reason="no compiled kernel")


def group(out: int, inp: int) -> PackedGroup:
    return convert(flat([[random_matrix((out, inp), Precision(4, 32))]]), "panels")


def made(room: int = 6, **changed: Any) -> Attention:
    """4 heads of 16 over 2 of keys and values, hidden 64."""
    given: dict[str, Any] = {
        "stream": Stream(64, 16, torch.float32),
        "shape": Shape(4, 2, 16, 0.25, 1e-6),
        "groups": {"q": group(64, 64), "k": group(32, 64), "v": group(32, 64), "o": group(64, 64)},
        "vectors": {"norm_before": torch.ones(64), "norm_after": torch.ones(64)},
        "keys": torch.zeros(1, 2, room, 16),
        "values": torch.zeros(1, 2, room, 16),
    }
    return Attention(**{**given, **changed})


def test_the_first_token_sees_itself_alone() -> None:
    """Attention over one token is its value: the result is o(v(norm(x))), whatever queries and keys are."""
    stream = Stream(64, 16, torch.float32)
    stream.cos.fill_(1.0)
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    stream.x.copy_(x)
    add = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1))
    one = made(stream=stream)
    h = one(add, 0)
    total = x + add.view(-1)
    v = cpu.grouped_linear(total[None] / (total.square().mean() + 1e-6).sqrt(), group(32, 64))
    want = total + cpu.grouped_linear(v.view(2, 1, 16).expand(2, 2, 16).reshape(1, 64), group(64, 64))[0]
    assert torch.allclose(stream.x, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    assert torch.allclose(h.view(-1), stream.x / (stream.x.square().mean() + 1e-6).sqrt(), rtol=1e-5)


def test_positions() -> None:
    one = made(room=6)
    one(None, 5)
    for outside in (6, -1):
        with pytest.raises(InputError, match="do not fit together"):
            one(None, outside)


def ones(length: int) -> Tensor:
    return torch.ones(length)


NORMS = {"norm_before": ones(64), "norm_after": ones(64)}
REFUSED = {
    "a bias too short": ({"vectors": {**NORMS, "q_bias": ones(32)}}, r"got q_bias \[32\]; expected \[64\]"),
    "norms of unlike extent": ({"vectors": {**NORMS, "q_norm": ones(16), "k_norm": ones(32)}}, "got k_norm"),
    "keys of another type": ({"keys": torch.zeros(1, 2, 6, 16).bfloat16()}, "got a cache torch.bfloat16"),
    "fewer heads": ({"values": torch.zeros(1, 1, 6, 16)}, "got a cache"),
    "less room for values": ({"values": torch.zeros(1, 2, 5, 16)}, "got a cache"),
    "a cache with gaps": ({"keys": torch.zeros(1, 2, 16, 6).mT}, "expected contiguous"),
    "heads of another size": ({"shape": Shape(4, 2, 32, 0.25, 1e-6)}, "expected heads of 32"),
    "a plain matrix": ({"groups": {n: flat([[random_matrix((64, 64), Precision(4, 32))]]) for n in "qkvo"}}, "panels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    changed, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        made(**changed)


def test_refused_when_called() -> None:
    for changed in (
        {"groups": {n: group(64, 64) for n in "qkvo"}},
        {"shape": Shape(3, 2, 16, 0.25, 1e-6)},
        {"stream": Stream(64, 18, torch.float32)},
    ):
        with pytest.raises(InputError, match="do not fit together"):
            made(**changed)(None, 0)
    with pytest.raises(InputError, match="a buffer is missing"):
        made(vectors={**NORMS, "q_norm": ones(64)})(None, 0)
    with pytest.raises(InputError, match=r"to add; expected torch\.float32"):
        made()(torch.zeros(32), 0)
    assert cpu.library().mopeq_attention(None) == 1
    assert cpu.library().mopeq_attention(ctypes.byref(attention._Job())) == 1
