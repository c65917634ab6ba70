"""Forms of packed modules: panels for the kernel, the plain form for everybody else, one copy in memory."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from test_experts import MIX, close, experts_of, packed_twin, routing
from torch import Tensor, nn

from mopeq.kernels import cpu, using
from mopeq.precision import FULL, Precision
from mopeq.qtensor import QTensor, dequantize, pack
from mopeq.quantizers import rtn
from mopeq.runtime import MixedExperts, QLinear, packed_modules, prepare

needs_library = pytest.mark.skipif(bool(cpu.why_not()), reason="no compiled kernel")


def model() -> Any:
    """A linear and the experts of a layer, plain."""
    torch.manual_seed(0)
    weight = torch.randn(24, 64)
    q: QTensor = pack(rtn(weight[None], Precision(3, 32))[0])
    linear = QLinear(64, 24, Precision(3, 32))
    for part in ("qweight", "scales", "zeros"):
        getattr(linear, part).copy_(getattr(q, part))
    torch.manual_seed(1)
    return nn.ModuleDict({"linear": linear, "experts": packed_twin(experts_of("olmoe")), "dense": nn.Linear(8, 8)})


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


X = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))


def outputs(module: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return module["linear"](X), module["experts"](X, *routing(5, 8, 3))


@needs_library
def test_panels_take_the_place_of_the_plain_form() -> None:
    plain = model()
    made = copy.deepcopy(plain)
    before, places = state(made), {name: b.data_ptr() for name, b in made.named_buffers()}
    assert prepare(made) == ["linear", "experts"]
    assert {m.mopeq_form for m in packed_modules(made).values()} == {"panels"}
    assert {name: b.data_ptr() for name, b in made.named_buffers()} == places
    assert not made["linear"].qweight.equal(plain["linear"].qweight)
    for got, want in zip(outputs(made), outputs(plain), strict=True):
        assert close(got, want, 1e-6)
    assert same(state(made), before)
    assert {m.mopeq_form for m in packed_modules(made).values()} == {"panels"}  # saving changes nothing
    assert {name: b.data_ptr() for name, b in made.named_buffers()} == places
    assert prepare(made) == ["linear", "experts"]
    assert same(state(made), before)


@needs_library
def test_the_kernel_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    prepare(made)
    calls: list[str] = []
    for name in ("grouped_linear", "experts"):
        real = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *args, n=name, real=real: calls.append(n) or real(*args))
    outputs(made)
    assert calls == ["grouped_linear", "experts"]
    made["linear"](X.requires_grad_())
    made["experts"](X, *routing(5, 8, 3))
    X.requires_grad_(False)
    index, weights = routing(5, 8, 3)
    made["experts"](X, index, weights.requires_grad_()).sum().backward()
    assert weights.grad is not None
    assert calls[2:] == ["grouped_linear"] * 2  # the products have no gradient, their combination has
    made["experts"].act_fn = nn.GELU()  # a gate that the kernel does not know
    outputs(made)
    assert calls[4:] == ["grouped_linear"] * 3


@needs_library
@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_state_dictionary(assign: bool) -> None:
    made, other = model(), model()
    with torch.no_grad():
        other["linear"].scales.mul_(2)
    prepare(made)
    given = other.state_dict()
    kept = {name: tensor.clone() for name, tensor in given.items()}
    made.load_state_dict(given, assign=assign)
    assert {m.mopeq_form for m in packed_modules(made).values()} == {"panels"}
    assert same(dict(given), kept)  # the caller's tensors are as they were
    for got, want in zip(outputs(made), outputs(other), strict=True):
        assert close(got, want, 1e-6)


MOVES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "cast": lambda m: m.to(torch.bfloat16),
}


@needs_library
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_copies_keep_the_form(move: Any) -> None:
    made = nn.ModuleDict({"linear": model()["linear"]})
    before = state(made)
    prepare(made)
    moved = move(made)
    assert moved["linear"].mopeq_form == "panels"
    assert same(state(moved), before)


@needs_library
def test_leaving_the_cpu_is_leaving_panels() -> None:
    made = model()
    prepare(made)
    gone = made.to("meta")
    assert {m.mopeq_form for m in packed_modules(gone).values()} == {"plain"}
    assert prepare(gone) == []


@needs_library
def test_without_the_library_panels_are_still_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model pickled in panels, opened where there is no library: right, and back in plain form if asked."""
    made = model()
    before, want = state(made), outputs(made)
    prepare(made)
    with using("naive"):
        for got, wanted in zip(outputs(made), want, strict=True):
            assert got.equal(wanted)
        assert same(state(made), before)
        made["linear"].convert("plain")
        assert same(state(made), before)
        assert prepare(made) == []


@needs_library
def test_shapes_that_have_no_panels_stay_plain() -> None:
    linear = QLinear(40, 8, Precision(4, -1))
    q = pack(rtn(torch.randn(1, 8, 40), Precision(4, -1))[0])
    for part in ("qweight", "scales", "zeros"):
        getattr(linear, part).copy_(getattr(q, part))
    made = nn.ModuleDict({"linear": linear})
    assert prepare(made) == []
    x = torch.randn(3, 40)
    assert close(linear(x), x @ dequantize(q).T)


@needs_library
@torch.no_grad()
def test_experts_elsewhere_and_no_tokens_in_panels() -> None:
    made = model()["experts"]
    assert isinstance(made, MixedExperts)
    assert FULL in MIX
    prepare(made)
    index, weights = routing(6, 8, 2)
    x = torch.randn(6, 64)
    known = made(x, index[:, :1], weights[:, :1])
    for sentinel in (8, 13, -1):
        beside = torch.stack([index[:, 0], torch.full((6,), sentinel)], 1)
        assert torch.equal(made(x, beside, weights), known)
    assert made(x[:0], *routing(0, 8, 2)).shape == (0, 64)
    assert torch.equal(made(x[2:3], index[2:3], weights[2:3])[0], made(x, index, weights)[2])
