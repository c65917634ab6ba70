"""``generate`` through native steps against the model's own passes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_step import FAMILIES, PROMPT, packed, saved
from transformers import DynamicCache

import packing
import tiny
from mopeq.kernels import selected
from mopeq.load import load
from mopeq.runtime import cache as caching
from mopeq.runtime.cache import Roomy
from mopeq.runtime.step import Step, body_of
from mopeq.runtime.stepping import Stepping

pytestmark = pytest.mark.skipif(selected().name != "cpu", reason="no compiled kernel")


@pytest.fixture(scope="module", params=FAMILIES)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]
) -> Any:
    return packed(saved(tiny_model, request.param), tmp_path_factory.mktemp("packed") / request.param).eval()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The positions of the steps that are taken."""
    taken: list[int] = []
    real = Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda self, token, at: taken.append(at) or real(self, token, at))
    return taken


def both(model: Any, prompt: torch.Tensor, **asked: Any) -> tuple[Any, Any]:
    """What generating gives with steps, and by the model's own passes."""
    given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False,
             "pad_token_id": 0} | asked  # fmt: skip
    torch.manual_seed(1)
    got = model.generate(prompt, **given)
    forward = model.__dict__.pop("forward")
    torch.manual_seed(1)
    want = model.generate(prompt, **given)
    model.forward = forward
    return got, want


@pytest.mark.parametrize("how", [{}, {"do_sample": True, "temperature": 1.2, "top_p": 0.9}], ids=["greedy", "sampled"])
def test_the_tokens_of_its_own_passes(model: Any, how: dict[str, Any], steps: list[int]) -> None:
    got, want = both(model, PROMPT, **how)
    assert got.equal(want)
    assert steps == list(range(9, 20))


def test_what_it_leaves_to_the_model(model: Any, steps: list[int]) -> None:
    model = copy.deepcopy(model)  # transformers leaves hooks in a model that was once asked for hidden states
    two = torch.cat((PROMPT, PROMPT.flip(1)))
    padded = {"attention_mask": torch.tensor([[0, 0, *[1] * 7]])}
    for prompt, asked in ((two, {}), (PROMPT, {"num_beams": 2}), (PROMPT, padded), (PROMPT, {"use_cache": False})):
        got, want = both(model, prompt, **asked)
        assert got.equal(want)
    asked = {"return_dict_in_generate": True, "output_hidden_states": True, "output_scores": True}
    got, want = both(model, PROMPT, **asked)
    assert len(got.hidden_states) == len(want.hidden_states) == 12
    assert not steps
    hook = body_of(model).model.register_forward_hook(lambda *args: steps.append(-1))
    both(model, PROMPT)
    hook.remove()
    assert steps == [-1] * 24
    with torch.enable_grad():
        cache = DynamicCache(config=model.config)
        model(input_ids=PROMPT, past_key_values=cache)
        model(input_ids=PROMPT[:, :1], past_key_values=cache)
    assert steps == [-1] * 24


@torch.no_grad()
def test_a_cache_that_others_change(model: Any, steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken back, put in another order and grown past its place, it holds what transformers' own would hold."""
    monkeypatch.setattr(caching, "LEAST", 4)
    token = torch.tensor([[5]])
    logits, lengths = [], []
    for forward in (model.forward, type(model).forward.__get__(model)):
        cache = DynamicCache(config=model.config)
        forward(input_ids=PROMPT, past_key_values=cache)
        made = [forward(input_ids=token + n, past_key_values=cache).logits for n in range(20)]
        cache.crop(-7)
        made += [forward(input_ids=token + n, past_key_values=cache).logits for n in range(3)]
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1]))
        made += [forward(input_ids=token + n, past_key_values=cache).logits for n in range(3)]
        made.append(forward(input_ids=PROMPT, past_key_values=cache).logits[:, -1:])
        made.append(forward(input_ids=token, past_key_values=cache).logits)
        logits.append(torch.cat(made))
        lengths.append(cache.get_seq_length())
        if forward is model.forward:
            assert len(steps) == 27
            assert all(type(layer) is Roomy for layer in cache.layers)
    assert lengths == [9 + 20 - 7 + 3 + 3 + 9 + 1] * 2
    assert float((logits[0] - logits[1]).norm()) < 1e-5 * float(logits[1].norm())


def test_a_copy_of_the_model_steps_for_itself(model: Any, steps: list[int]) -> None:
    twin = copy.deepcopy(model)
    assert isinstance(twin.forward, Stepping)
    assert twin.forward.model is twin
    with torch.no_grad():
        for parameter in body_of(twin).model.norm.parameters():
            parameter.neg_()
    got, want = both(twin, PROMPT)
    assert got.equal(want)
    assert steps
    assert not got.equal(both(model, PROMPT)[0])


def test_models_of_other_families_keep_their_forward(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    packing.pack_model(tiny_model("granitemoe"), tmp_path / "packed")
    assert "forward" not in load(tmp_path / "packed", dtype=torch.float32).__dict__
    assert "forward" not in tiny.tiny_model("olmoe").__dict__
