from typing import Any

import pytest
import torch
from measuring import Make, batches, case

from mopeq.analyze.moments import moments
from mopeq.analyze.observe import Routed, observe
from mopeq.seam import activate
from mopeq.source import read_group


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "llama4_text"])
def test_against_sums_over_single_tokens(tiny_model: Make, family: str) -> None:
    model, source, spec = case(tiny_model, family)
    layer = spec.layers[0]
    seen = observe(model, spec, batches((2, 9)))[layer.index]
    module, gate_up = model.get_submodule(layer.module), read_group(source, layer, "gate_up")
    found = moments(seen, module, gate_up)
    n = len(layer.experts)
    up = torch.zeros(n, layer.hidden_size, layer.hidden_size, dtype=torch.float64)
    down = torch.zeros(n, layer.intermediate_size, layer.intermediate_size, dtype=torch.float64)
    tokens = [0] * n
    for x, experts, weights in zip(seen.hidden.double(), seen.index.tolist(), seen.weights.tolist(), strict=True):
        for e, c in zip(experts, weights, strict=True):
            x_e, c_e = (c * x, 1.0) if family.startswith("llama4") else (x, c)
            h = activate(module, (gate_up[e].double() @ x_e)[None], e)[0]
            up[e] += c_e**2 * torch.outer(x_e, x_e)
            down[e] += c_e**2 * torch.outer(h, h)
            tokens[e] += 1
    assert found.tokens.tolist() == tokens
    torch.testing.assert_close(found.gate_up.double(), up, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.down.double(), down, rtol=1e-4, atol=1e-4)


def test_chunks_do_not_matter_and_unused_experts_are_zero(tiny_model: Make) -> None:
    model, source, spec = case(tiny_model)
    layer = spec.layers[1]
    seen = observe(model, spec, batches((1, 12)))[1]
    seen.index[seen.index == 3] = -1
    module, gate_up = model.get_submodule(layer.module), read_group(source, layer, "gate_up")
    whole, parts = moments(seen, module, gate_up), moments(seen, module, gate_up, chunk=1)
    torch.testing.assert_close(whole.gate_up, parts.gate_up)
    torch.testing.assert_close(whole.down, parts.down)
    assert int(whole.tokens[3]) == 0
    assert not bool(whole.gate_up[3].any())
    assert not bool(whole.down[3].any())


def test_no_tokens_at_all(tiny_model: Make) -> None:
    model, source, spec = case(tiny_model)
    empty = Routed(torch.zeros(0, 64), torch.zeros(0, 2).long(), torch.zeros(0, 2), False)
    module: Any = model.get_submodule(spec.layers[0].module)
    found = moments(empty, module, read_group(source, spec.layers[0], "gate_up"))
    assert found.tokens.tolist() == [0] * 8
    assert not bool(found.gate_up.any())
