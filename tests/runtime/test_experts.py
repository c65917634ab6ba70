"""Packed experts modules against the transformers modules that they were made from, with dequantized weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from mopeq.errors import CheckpointError
from mopeq.kernels import selected
from mopeq.kernels.layout import PARTS, GroupLayout
from mopeq.precision import FULL, GROUPS, Precision
from mopeq.qtensor import QTensor, dequantize, pack, pack_full
from mopeq.quantizers import rtn_mse
from mopeq.runtime.experts import MixedExperts, pack_experts
from mopeq.runtime.packed import prepare
from mopeq.seam import activate, gate_of, gate_up_bias, is_experts

MIX = (
    FULL,
    Precision(4, 32, True),
    Precision(3, 32),
    Precision(2, -1),
    Precision(8, 64),
    Precision(5, 32),
    Precision(6, 64),
    Precision(2, 64, codebook=True),
)
ROUTED = ("olmoe", "gpt_oss", "granitemoe")


def experts_of(family: str) -> nn.Module:
    return next(m for m in tiny.tiny_model(family).modules() if is_experts(m))


def packed_twin(module: Any) -> MixedExperts:
    """Pack a copy of ``module`` by rounding, and write the dequantized weights back into ``module``."""
    twin = copy.deepcopy(module)
    swapped = module.gate_up_proj.shape[1] == module.down_proj.shape[2]  # (experts, in, out)
    interleaved = not getattr(module, "is_concatenated", True)
    count = module.gate_up_proj.shape[0]
    layouts, buffers = {}, {}
    for number, group in enumerate(GROUPS):
        stored = getattr(module, f"{group}_proj")
        rows: list[list[QTensor]] = []
        chosen = tuple(MIX[(e + 2 * number) % len(MIX)] for e in range(count))
        for e, precision in enumerate(chosen):
            dense = stored.data[e].T if swapped else stored.data[e]
            parts = [slice(None)] if group == "down" else [slice(0, None, 2), slice(1, None, 2)]
            if group == "gate_up" and not interleaved:
                parts = [slice(0, dense.shape[0] // 2), slice(dense.shape[0] // 2, None)]
            rows.append([])
            for part in parts:
                weight = dense[part].clone()
                q = pack_full(weight) if precision == FULL else pack(rtn_mse(weight[None], precision)[0])
                rows[-1].append(q)
                dense[part] = dequantize(q)
        layouts[group] = GroupLayout(chosen, tuple(q.shape for q in rows[0]))
        for part in PARTS:
            pieces = [t.flatten() for row in rows for q in row if (t := getattr(q, part)) is not None]
            buffers[f"{group}_{part}"] = torch.cat(pieces)
    pack_experts(twin, 7, layouts)
    for name, value in buffers.items():
        assert getattr(twin, name).shape == value.shape
        getattr(twin, name).copy_(value)
    return twin


def routing(tokens: int, experts: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, experts, generator=draw).argsort(-1)[:, :k]
    return index, torch.rand(tokens, k, generator=draw)


def close(got: Tensor, want: Tensor, limit: float = 1e-5) -> bool:
    return got.shape == want.shape and float((got - want).norm()) <= limit * float(want.norm())


@pytest.fixture(scope="module", params=ROUTED)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    module: Any = experts_of(request.param)
    twin = packed_twin(module)
    module.config._experts_implementation = "eager"
    return module, twin


@pytest.mark.parametrize("tokens", [1, 2, 33])
@torch.no_grad()
def test_equals_the_dense_module(pair: tuple[Any, Any], tokens: int) -> None:
    module, twin = pair
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens))
    index, weights = routing(tokens, module.num_experts, 2, tokens)
    want = module(x, index, weights)
    assert close(twin(x, index, weights), want)
    assert not close(twin(x, index, weights.flip(-1)), want)


@torch.no_grad()
def test_no_tokens_and_one_expert(pair: tuple[Any, Any]) -> None:
    module, twin = pair
    x = torch.randn(5, 64)
    assert twin(x[:0], *routing(0, module.num_experts, 2)).shape == (0, 64)
    index = torch.full((5, 1), module.num_experts - 1)
    weights = torch.rand(5, 1)
    assert close(twin(x, index, weights), module(x, index, weights))


@torch.no_grad()
def test_ids_of_experts_elsewhere_add_nothing(pair: tuple[Any, Any]) -> None:
    module, twin = pair
    x = torch.randn(6, 64)
    index, weights = routing(6, module.num_experts, 2)
    known = twin(x, index[:, :1], weights[:, :1])
    for sentinel in (module.num_experts, module.num_experts + 5, -1):
        beside = torch.stack([index[:, 0], torch.full((6,), sentinel)], 1)
        assert torch.equal(twin(x, beside, weights), known)
    nobody = torch.full((6, 2), module.num_experts)
    assert not twin(x, nobody, weights).any()


@torch.no_grad()
def test_uninitialised_memory_is_never_read(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module, twin = pair
    x = torch.randn(4, 64)
    index, weights = routing(4, module.num_experts + 1, 2)
    want = twin(x, index, weights)

    def poisoned(make: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            made: Tensor = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(255)

        return call

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
    assert torch.equal(twin(x, index, weights), want)


@torch.no_grad()
def test_low_precision_adds_up_in_float32() -> None:
    """In bfloat16 the sum over experts is rounded once: closer to the float32 result than adding in bfloat16."""
    module: Any = experts_of("olmoe")
    twin = packed_twin(module)
    module.config._experts_implementation = "eager"
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    index, weights = routing(64, 8, 8)
    exact = module(x.float(), index, weights)
    got = twin(x, index, weights)
    assert got.dtype == torch.bfloat16
    assert (got.float() - exact).norm() < 0.9 * (module.bfloat16()(x, index, weights).float() - exact).norm()


@torch.no_grad()
def test_llama4_takes_all_tokens_for_every_expert() -> None:
    module: Any = experts_of("llama4_text")
    twin = packed_twin(module)
    scores = torch.zeros(4, 6)
    scores[torch.randint(0, 4, (6,), generator=torch.Generator().manual_seed(0)), torch.arange(6)] = 0.5
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    rows = (x.repeat(4, 1) * scores.reshape(-1, 1)).contiguous()
    want = module(rows)
    assert close(twin(rows), want)
    assert not twin(torch.zeros_like(rows)).any()
    assert twin(rows[:0]).shape == (0, 64)
    everywhere = x.repeat(4, 1)
    assert close(twin(everywhere), module(everywhere))


def test_weights_are_gone_and_types_stay(pair: tuple[Any, Any]) -> None:
    module, twin = pair
    assert type(twin).__name__ == f"Mopeq{type(module).__name__}"
    assert isinstance(twin, type(module))
    assert is_experts(twin)
    assert twin.mopeq_layer == 7
    assert {n for n, _ in twin.named_parameters()} == {n for n, _ in module.named_parameters() if n.endswith("bias")}
    for cast in (torch.float64, torch.bfloat16):
        other = copy.deepcopy(twin).to(cast)
        for name, buffer in twin.named_buffers():
            moved = getattr(other, name)
            assert moved.dtype == buffer.dtype
            assert moved.equal(buffer)
        assert all(p.dtype == cast for p in other.parameters())
    assert "layer=7" in repr(twin)
    assert "'16': 1" in repr(twin)


def test_one_class_for_each_class() -> None:
    model = tiny.tiny_model("olmoe")
    first, second = (m for m in model.modules() if is_experts(m))
    assert type(packed_twin(first)) is type(packed_twin(second))


def test_on_meta_nothing_is_allocated() -> None:
    module: Any = experts_of("olmoe").to("meta")
    layout = {
        g: GroupLayout((Precision(3, 32),) * 8, ((128, 64),) * 2 if g == "gate_up" else ((64, 128),)) for g in GROUPS
    }
    pack_experts(module, 0, layout)
    assert {b.device.type for b in module.buffers()} == {"meta"}
    assert module._is_hf_initialized


def test_refusals() -> None:
    layout = {
        g: GroupLayout((Precision(3, 32),) * 8, ((128, 64),) * 2 if g == "gate_up" else ((64, 128),)) for g in GROUPS
    }
    with pytest.raises(CheckpointError, match="layer 3: Linear is no experts module"):
        pack_experts(nn.Linear(2, 2), 3, layout)
    module: Any = experts_of("olmoe")
    wrong = {**layout, "down": GroupLayout((Precision(3, 32),) * 8, ((64, 96),))}
    with pytest.raises(CheckpointError, match=r"down_proj is \(8, 64, 128\), the checkpoint has \(8, 64, 96\)"):
        pack_experts(module, 0, wrong)
    fewer = {g: GroupLayout(v.precisions[:7], v.shapes) for g, v in layout.items()}
    with pytest.raises(CheckpointError, match=r"gate_up_proj is \(8, 256, 64\), the checkpoint has \(7, 256, 64\)"):
        pack_experts(module, 0, fewer)
    assert isinstance(module.gate_up_proj, nn.Parameter)  # nothing was changed
    module.has_post_expert_norm = True
    with pytest.raises(CheckpointError, match="a norm after its experts"):
        pack_experts(module, 0, layout)
    module.has_post_expert_norm = False
    pack_experts(module, 0, layout)
    with pytest.raises(CheckpointError, match="MopeqOlmoeExperts is no experts module"):
        pack_experts(module, 0, layout)


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_kernel_knows_every_gate(family: str) -> None:
    """The numbers of ``gate_of`` say what the module computes."""
    module: Any = experts_of(family)
    gate = gate_of(module)
    assert gate is not None
    g, u = torch.randn(2, 3, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 10
    want = activate(module.double(), torch.cat([g, u], -1), torch.zeros(3, dtype=torch.int64))
    bias = gate_up_bias(module, 0)
    if bias is not None:
        g, u = (g + bias[::2], u + bias[1::2]) if gate.interleaved else (g + bias[:128], u + bias[128:])
    g, u = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit)
    assert close((u + gate.shift) * g * torch.sigmoid(gate.alpha * g), want, 1e-12)


@pytest.mark.skipif(selected().name != "cpu", reason="no compiled kernel")
def test_one_graph_when_compiled(pair: tuple[Any, Any]) -> None:
    twin = copy.deepcopy(pair[1])
    prepare(twin)
    x = torch.randn(5, 64)
    index, weights = routing(5, twin.num_experts, 2)
    with torch.no_grad():
        compiled = torch.compile(twin, fullgraph=True, backend="eager")
        assert compiled(x, index, weights).equal(twin(x, index, weights))
