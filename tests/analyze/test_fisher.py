from types import SimpleNamespace
from typing import Any

import pytest
import torch
from measuring import MICRO, Make, batches, case
from torch import Tensor, nn

from mopeq.analyze.fisher import fisher, ratio
from mopeq.errors import DataError, ModelError
from mopeq.spec import MoELayer, MoESpec


class Regression(nn.Module):
    """Softmax regression by experts: token i goes to expert i % experts, whose ``down_proj`` makes the logits."""

    def __init__(self, tokens: int = 5, experts: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.config = SimpleNamespace()
        self.embedding = nn.Embedding.from_pretrained(torch.randn(tokens, 4, generator=generator))
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.randn(experts, 2, 4, generator=generator))
        self.experts.down_proj = nn.Parameter(torch.randn(experts, tokens, 4, generator=generator))

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> SimpleNamespace:
        down: Any = self.experts.down_proj
        x, w = self.embedding(input_ids), down[input_ids % len(down)]
        return SimpleNamespace(logits=torch.einsum("bth,btvh->btv", x, w))


def test_closed_form_of_softmax_regression() -> None:
    model = Regression()
    experts: Any = (None, None, None)
    spec = MoESpec("regression", (MoELayer(0, "experts", "", experts, 1, 4, 1),), (), ())
    data = batches((4, 6), (4, 6))
    for batch in data:
        batch["input_ids"] %= 5
    data[0]["attention_mask"][1, 3:] = 0
    means, errors = fisher(model, spec, data, seed=1, samples=40)
    exact = torch.zeros(3)
    kept = torch.cat([b["input_ids"][b["attention_mask"].bool()] for b in data])
    with torch.no_grad():
        for token in kept:
            x = model.embedding(token)
            p = (model.experts.down_proj[token % 3] @ x).softmax(-1)
            exact[token % 3] += x.square().sum() * (1 - p.square().sum())  # E||(p - e_y) x^T||^2
    exact /= len(kept)
    for e in range(3):
        assert 0 < errors[0][e] < 0.2 * float(exact[e])
        assert abs(means[0][e] - float(exact[e])) < 4 * errors[0][e]


def test_agrees_with_the_sum_over_all_labels(tiny_model: Make) -> None:
    model, _, spec = case(tiny_model, **MICRO)
    (batch,) = batches((1, 2), words=9)
    model.set_experts_implementation("eager")
    log_p = model(**batch, use_cache=False).logits[0].log_softmax(-1)  # (2, vocabulary)
    weights = [p for layer in spec.layers for p in model.get_submodule(layer.module).parameters()]
    exact = torch.zeros(2, 4)
    for t in range(2):
        for y in range(log_p.shape[1]):
            gradients = torch.autograd.grad(log_p[t, y], weights, retain_graph=True, allow_unused=True)
            for i, g in enumerate(gradients):
                if g is not None:
                    exact[i // 2] += log_p[t, y].exp().detach() * g.flatten(1).square().sum(1) / 2
    means, errors = fisher(model, spec, [batch], samples=150, seed=4)
    for layer in range(2):
        used = [e for e in range(4) if exact[layer, e] > 0]
        assert len(used) >= 2
        assert all(means[layer][e] == 0 == errors[layer][e] for e in range(4) if e not in used)
        for e in used:
            assert abs(means[layer][e] - float(exact[layer, e])) < 4 * errors[layer][e]
            assert errors[layer][e] < 0.3 * float(exact[layer, e])


def test_ratio_of_means() -> None:
    squares, tokens = torch.tensor([[2.0, 0.0], [6.0, 0.0]]).double(), torch.tensor([1, 3])
    mean, error = ratio(squares, tokens)
    assert mean.tolist() == [2.0, 0.0]
    assert error.tolist() == [0.0, 0.0]
    mean, error = ratio(torch.tensor([1.0, 3.0]).double(), torch.tensor([1, 1]))
    assert (float(mean), float(error)) == (2.0, 1.0)  # the standard error of a mean of two


def test_the_model_is_left_as_it_was_and_batches_do_not_matter(tiny_model: Make) -> None:
    model, _, spec = case(tiny_model, dtype=torch.bfloat16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    experts = model.model.layers[0].mlp.experts
    experts.down_proj.grad = torch.ones_like(experts.down_proj)
    together = batches((4, 6))
    apart = [{k: v[i : i + 2] for k, v in together[0].items()} for i in (0, 2)]
    assert fisher(model, spec, together) == fisher(model, spec, apart)
    assert experts.down_proj.grad is not None
    assert bool((experts.down_proj.grad == 1).all())
    assert not experts.down_proj._post_accumulate_grad_hooks
    assert all(p.requires_grad for p in model.parameters())
    assert all(v.dtype == before[k].dtype and torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_refusals(tiny_model: Make) -> None:
    model, _, spec = case(tiny_model)
    with pytest.raises(DataError, match="1 draws"):
        fisher(model, spec, batches((1, 4)))
    patches = batches((2, 4))
    patches[0]["pixel_values"] = torch.zeros(7, 3)
    with pytest.raises(DataError, match="'pixel_values' has 7 rows for 2 sequences"):
        fisher(model, spec, patches)
    with torch.no_grad():
        model.lm_head.weight[0] = torch.inf
    with pytest.raises(ModelError, match="NaN or infinite"):
        fisher(model, spec, batches((2, 4)))
