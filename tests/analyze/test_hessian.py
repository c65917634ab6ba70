from typing import Any

import pytest
import torch
from measuring import MICRO, Make, batches, case
from torch import Tensor
from torch.func import functional_call

from mopeq.analyze.hessian import hessian_trace, slice_traces
from mopeq.errors import DataError, ModelError


def quadratic(experts: int, n: int) -> tuple[Tensor, Tensor]:
    """Weights (experts, 2, n/2) and a symmetric matrix (experts * n, experts * n) that couples all of them."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(experts * n, experts * n, generator=generator, dtype=torch.float64)
    w = torch.randn(experts, 2, n // 2, generator=generator, dtype=torch.float64)
    return w.requires_grad_(), half + half.T


def test_quadratic_with_coupled_experts() -> None:
    w, a = quadratic(3, 6)
    loss = 0.5 * w.flatten() @ a @ w.flatten() + w.sum()
    (samples,) = slice_traces(loss, [w], 4000, torch.Generator().manual_seed(1))
    exact = a.diagonal().view(3, 6).sum(1)
    error = samples.std(0) / 4000**0.5
    assert bool((error > 0).all())
    assert bool(((samples.mean(0) - exact).abs() < 4 * error).all())


def test_diagonal_quadratic_needs_one_probe() -> None:
    w, a = quadratic(3, 6)
    loss = 0.5 * (a.diagonal() * w.flatten().square()).sum()
    (samples,) = slice_traces(loss, [w], 2, torch.Generator().manual_seed(1))
    torch.testing.assert_close(samples, a.diagonal().view(3, 6).sum(1).expand(2, 3))


def exact_trace(model: Any, data: list[dict[str, Tensor]], layer: int, expert: int) -> float:
    """Trace of the whole Hessian of the mean next-token loss with respect to one expert's weights."""
    prefix = f"model.layers.{layer}.mlp.experts."
    whole = {n: model.get_parameter(prefix + n).detach() for n in ("gate_up_proj", "down_proj")}
    sizes = [w[expert].numel() for w in whole.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = dict(zip(whole, flat.split(sizes), strict=True))
        changed = {
            prefix + n: torch.cat([w[:expert], parts[n].view_as(w[expert])[None], w[expert + 1 :]])
            for n, w in whole.items()
        }
        total, count = torch.zeros(()), 0
        for batch in data:
            logits = functional_call(model, changed, (), {**batch, "use_cache": False}).logits[:, :-1]
            kept = (batch["attention_mask"][:, 1:] * batch["attention_mask"][:, :-1]).bool()
            labels = batch["input_ids"][:, 1:][kept]
            total = total + torch.nn.functional.cross_entropy(logits[kept], labels, reduction="sum")
            count += len(labels)
        return total / count

    start = torch.cat([w[expert].flatten() for w in whole.values()])
    return float(torch.autograd.functional.hessian(loss, start).trace())


def test_agrees_with_the_exact_hessian_of_a_small_model(tiny_model: Make) -> None:
    model, _, spec = case(tiny_model, **MICRO)
    with torch.no_grad():
        model.lm_head.weight.mul_(6)  # curvature of a softmax grows with the square, traces stand clear of the noise
    data = batches((2, 5), (1, 4), words=9)
    data[0]["attention_mask"][1, 4:] = 0
    means, errors = hessian_trace(model, spec, data, probes=250, seed=1)
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    clear = 0
    for layer, expert in ((0, 1), (0, 3), (1, 0), (1, 2)):
        exact, error = exact_trace(model, data, layer, expert), errors[layer][expert]
        assert error > 0
        assert abs(means[layer][expert] - exact) < 4 * error
        clear += abs(exact) > 3 * error
    assert clear >= 2  # the others are too near to zero to tell a right estimate from none


def test_experts_without_tokens_have_no_curvature(tiny_model: Make) -> None:
    model, _, spec = case(tiny_model)
    means, errors = hessian_trace(model, spec, batches((1, 2)), probes=2)
    unused = [e for e in range(8) if means[1][e] == 0]
    assert len(unused) >= 4  # two tokens of two experts each
    assert all(errors[1][e] == 0 for e in unused)


def test_the_seed_decides_and_the_model_is_left_as_it_was(tiny_model: Make) -> None:
    model, _, spec = case(tiny_model, dtype=torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, second, other = (hessian_trace(model, spec, batches((1, 5)), probes=2, seed=s)[0] for s in (0, 0, 1))
    assert first == second
    assert first != other
    assert model.config._experts_implementation == "grouped_mm"
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(v.dtype == before[k].dtype and torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_model_in_bfloat16_is_measured_in_float32(tiny_model: Make) -> None:
    small, _, spec = case(tiny_model, dtype=torch.bfloat16)
    wide = case(tiny_model, dtype=torch.bfloat16).model.float()
    found, wanted = (hessian_trace(m, spec, batches((1, 5)), probes=2)[0] for m in (small, wide))
    for layer, row in found.items():
        assert row == pytest.approx(wanted[layer], rel=1e-3, abs=1e-4)


def test_refusals(tiny_model: Make) -> None:
    model, _, spec = case(tiny_model)
    with pytest.raises(DataError, match="1 probes; expected at least 2"):
        hessian_trace(model, spec, batches((1, 4)), probes=1)
    with pytest.raises(DataError, match="no token to predict"):
        hessian_trace(model, spec, batches((2, 1)))
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ModelError, match="'flex_attention' cannot be differentiated twice"):
        hessian_trace(model, spec, batches((1, 4)))
    model.config._attn_implementation = "sdpa"
    with torch.no_grad():
        model.lm_head.weight[0] = torch.inf
    with pytest.raises(ModelError, match="logits are NaN or infinite"):
        hessian_trace(model, spec, batches((1, 4)), probes=2)
    experts = model.model.layers[1].mlp.experts
    del experts.gate_up_proj, experts.down_proj
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.experts holds no weights"):
        hessian_trace(model, spec, batches((1, 4)))
