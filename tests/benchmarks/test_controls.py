"""Costs of other allocators, against what the module itself shows and against literal loops."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import cloze
import controls
import frontier
import tiny
from mopeq.allocate import allocate, uniform_map
from mopeq.analyze import observe
from mopeq.measure import Prepared, open_model
from mopeq.precision import GROUPS, LEFT_OUT, Precision
from mopeq.qtensor import dequantize
from mopeq.quantizers import rtn
from mopeq.source import read_group
from mopeq.stats import Stats, cost_metric

P = Precision(2, 32)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    opened = open_model(tiny.save_tiny("olmoe", tmp_path_factory.mktemp("model")))
    model = tiny.tiny_model("olmoe")
    ids = torch.randint(0, 256, (2, 3, 14), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids]
    return replace(opened, model=model, batches=batches, routed=observe(model, opened.spec, batches))


def test_costs_are_the_changes_that_the_module_shows(prepared: Prepared) -> None:
    found = controls.control_costs(prepared, [P])
    gradients = controls.data_gradients(prepared)
    layer = prepared.spec.layers[1]
    seen, module = prepared.routed[layer.index], prepared.model.get_submodule(layer.module)
    with torch.no_grad():
        before = module(seen.hidden, seen.index, seen.weights)
        kept = {group: getattr(module, f"{group}_proj").data.clone() for group in GROUPS}
        for expert in range(3):
            for group in GROUPS:
                weight = read_group(prepared.source, layer, group, [expert])
                getattr(module, f"{group}_proj").data[expert] = dequantize(rtn(weight, P))[0]
            change = module(seen.hidden, seen.index, seen.weights) - before
            for group in GROUPS:
                getattr(module, f"{group}_proj").data.copy_(kept[group])
            mine = seen.index == expert
            used, weight = mine.sum() / seen.index.numel(), seen.weights[mine].mean()
            means = [seen.weights[seen.index == e].mean() for e in range(8)]
            share = weight / torch.stack(means).nan_to_num().sum()
            expected = {
                "gemq": (change * gradients[layer.index]).square().sum(),
                "pmq": used * share**1.5 * change.norm() ** 2,
                "mode": used * (change[mine.any(-1)] / seen.weights[mine][:, None]).square().sum(-1).mean(),
            }
            for cost, value in expected.items():
                row = found[cost_metric(cost, "gate_up", P)][layer.index]
                assert row[expert] == pytest.approx(float(value), rel=1e-3), cost
            assert found[cost_metric("gemq", "down", P)][layer.index][expert] == 0


def test_gradients_are_those_of_the_datas_own_tokens(prepared: Prepared) -> None:
    layer, batch = prepared.spec.layers[-1], prepared.batches[0]
    module = prepared.model.get_submodule(layer.module)
    shift = torch.zeros(batch["input_ids"].numel(), 64, requires_grad=True)
    handle = module.register_forward_hook(lambda module, args, output: output + shift)
    logits = prepared.model(batch["input_ids"]).logits[:, :-1]
    handle.remove()
    nats = -logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).sum()
    (expected,) = torch.autograd.grad(nats, shift)
    torch.testing.assert_close(controls.data_gradients(prepared)[layer.index][: len(expected)], expected)


def test_the_exponent_of_a_matrix() -> None:
    matrices = torch.randn(2, 128, 192, generator=torch.Generator().manual_seed(1))
    for matrix, found in zip(matrices, controls.hill(matrices), strict=True):
        values = sorted(
            float(value)
            for at in (0, 64)
            for value in torch.linalg.eigvalsh(matrix[:, at : at + 128].double().T @ matrix[:, at : at + 128].double())
        )
        k = len(values) // 10
        expected = 1 + k / sum(math.log(values[-i] / values[-k - 1]) for i in range(1, k + 1))
        assert float(found) == pytest.approx(expected, rel=1e-6)


def test_alphaq_prefers_heavy_tails(prepared: Prepared) -> None:
    costs = controls.alphaq(prepared, [P, Precision(3, 32)])
    two, three = (costs[cost_metric("alphaq", "gate_up", p)][0] for p in (P, Precision(3, 32)))
    assert np.allclose(np.array(two) / np.array(three), 4)


def test_every_layer_gets_its_share(prepared: Prepared) -> None:
    inventory, options = prepared.inventory, [P, Precision(3, 32), Precision(4, 32)]
    draw = np.random.default_rng(0)
    costs = {
        cost_metric("pmq", group, p): {
            layer: ((1 + 100 * layer) * draw.random(n) * 4.0**-p.bits).tolist()
            for layer, n in inventory.experts.items()
        }
        for group in GROUPS
        for p in options
    }
    stats = Stats(inventory, {}).with_metrics(costs)
    budget = inventory.expert_bytes(uniform_map(inventory, [Precision(3, 32)]))
    made = controls.layerwise(stats, "pmq", budget, options, {})
    assert inventory.expert_bytes(made) <= budget
    for row in made.experts["down"].values():
        assert sum(p.bits for p in row) / len(row) == pytest.approx(3, abs=0.13)
    assert len({p for row in made.experts["down"].values() for p in row}) == 3


def test_ranks_within_a_layer() -> None:
    assert controls.layer_ranks({0: (5.0, 1.0, 3.0), 1: (0.1, 0.3, 0.2)}) == {0: [1, 0, 0.5], 1: [0, 1, 0.5]}


def test_unused_experts_are_those_that_few_tokens_choose(prepared: Prepared) -> None:
    used = {layer: tuple(float((3 * e + layer) % 8) for e in range(8)) for layer in prepared.inventory.experts}
    stats = Stats(prepared.inventory, {}).with_metrics(controls.unused(used, P))
    kept = uniform_map(prepared.inventory, [P])
    budget = f"{prepared.inventory.total_bytes(kept) - prepared.inventory.expert_bytes(kept) // 4}B"
    made = allocate(stats, budget=budget, cost="unused", options=[LEFT_OUT, P], granularity="expert")
    for layer, row in made.experts["down"].items():
        assert {used[layer][e] for e, p in enumerate(row) if p == LEFT_OUT} <= {0.0, 1.0, 2.0}
    assert sum(p == LEFT_OUT for row in made.experts["down"].values() for p in row) == 2 * len(used)


def test_the_others_take_the_weight_of_experts_that_are_left_out(prepared: Prepared) -> None:
    model = copy.deepcopy(prepared.model)
    study = frontier.Study(0, prepared, Stats(prepared.inventory, {}), {}, model, {})
    layer = prepared.spec.layers[1]
    seen, module = prepared.routed[layer.index], model.get_submodule(layer.module)
    study.gone[layer.index] = torch.tensor([e in (1, 4) for e in range(8)])
    with torch.no_grad():
        found = module(seen.hidden, seen.index, seen.weights)
        study.clear()
        for token in range(len(seen.hidden)):
            slots = [s for s, e in enumerate(seen.index[token].tolist()) if e not in (1, 4)]
            weights = torch.zeros_like(seen.weights[token : token + 1])
            for s in slots:
                weights[0, s] = seen.weights[token, s] * seen.weights[token].sum() / seen.weights[token, slots].sum()
            expected = module(seen.hidden[token : token + 1], seen.index[token : token + 1], weights)
            torch.testing.assert_close(found[token : token + 1], expected, rtol=1e-4, atol=1e-6)


def test_the_real_continuation_is_first_and_ahead_of_the_best_other(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i * i % 26) for i in range(4000)), encoding="utf-8")
    tiny.save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    asked = cloze.questions([str(text)], tokenizer, 8)
    whole = text.read_text(encoding="utf-8")
    model = tiny.tiny_model("olmoe").eval()
    for question, margin in zip(asked, cloze.margins(model, asked, batch=3), strict=True):
        assert tokenizer.decode(question.context + question.choices[0]) in whole
        assert [len(part) for part in (question.context, *question.choices)] == [cloze.CONTEXT, *[cloze.ANSWER] * 4]
        nats = []
        for choice in question.choices:
            ids = torch.tensor([question.context + choice])
            logits = model(input_ids=ids).logits[0].log_softmax(-1).detach()
            nats.append(sum(logits[at - 1, ids[0, at]] for at in range(cloze.CONTEXT, ids.shape[1])))
        assert margin == pytest.approx(float(nats[0] - max(nats[1:])), abs=1e-3)
