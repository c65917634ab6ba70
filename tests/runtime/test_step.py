"""Native steps against the model's own forward passes, family by family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_decode import by_transformers
from transformers import DynamicCache

import packing
import tiny
from mopeq.adapters import describe, inventory_of
from mopeq.kernels import selected, using
from mopeq.load import load
from mopeq.precision import FULL, PrecisionMap
from mopeq.runtime import decode as decoding
from mopeq.runtime.decode import Sampling, decode
from mopeq.runtime.step import Step, body_of, step_of
from mopeq.source import open_source

pytestmark = pytest.mark.skipif(selected().name != "cpu", reason="no compiled kernel")
FAMILIES = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "deepseek_vl_v2")
PLAIN = {"model_type": "deepseek_ocr2_text", "num_key_value_heads": 4, "mlp_layer_types": ["dense", "sparse", "sparse"]}
"""The decoder of DeepSeek-VL2-tiny, in place of one with latent attention."""
PROMPT = torch.randint(0, 250, (1, 9), generator=torch.Generator().manual_seed(0))
STOPS = frozenset([tiny.EOS])


def saved(tiny_model: Callable[..., Path], family: str) -> Path:
    """An original of one of the families."""
    return tiny_model(family, **(PLAIN if family == "deepseek_vl_v2" else {}))


def packed(folder: Path, out: Path) -> Any:
    """A tiny model, packed and loaded."""
    packing.pack_model(folder, out)
    return load(out, dtype=torch.float32)


@pytest.fixture(scope="module", params=FAMILIES)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]
) -> Any:
    made = packed(saved(tiny_model, request.param), tmp_path_factory.mktemp("packed") / request.param)
    del made.forward  # generate and the model's passes are what steps are compared with
    return made


def prefilled(model: Any, room: int = 40) -> Any:
    cache = decoding._cache(model, room)
    model(input_ids=PROMPT, past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
def test_logits_of_every_step(model: Any) -> None:
    own = DynamicCache(config=model.config)
    model(input_ids=PROMPT, past_key_values=own, use_cache=True)
    step = step_of(model, prefilled(model))
    assert isinstance(step, Step)
    for number, token in enumerate([5, 200, 31, 0, 77, 77, 141]):
        want = model(input_ids=torch.tensor([[token]]), past_key_values=own, use_cache=True).logits[:, -1]
        got = step(torch.tensor([[token]]), PROMPT.shape[1] + number)
        assert got.shape == want.shape
        assert float((got - want).norm()) < 1e-5 * float(want.norm())


@pytest.mark.parametrize("how", [Sampling(), Sampling(1.2, top_p=0.9, top_k=50)], ids=["greedy", "sampled"])
@torch.no_grad()
def test_the_tokens_of_transformers(model: Any, how: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    real = Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda self, token, at: steps.append(at) or real(self, token, at))
    torch.manual_seed(1)
    want = by_transformers(model, PROMPT, 25, how, [*STOPS])
    torch.manual_seed(1)
    assert list(decode(model, PROMPT, 25, STOPS, how)) == want
    assert steps == list(range(PROMPT.shape[1], PROMPT.shape[1] + len(want) - 1))


@torch.no_grad()
def test_threads_and_instruction_sets_change_nothing(model: Any) -> None:
    from mopeq.kernels import cpu

    lib, isa, threads = cpu.library(), cpu.library().mopeq_isa(), torch.get_num_threads()
    try:
        runs = []
        for which in range(lib.mopeq_best_isa() + 1):
            for count in (1, 3):
                lib.mopeq_use_isa(which)
                torch.set_num_threads(count)
                cache = decoding._cache(model, 40)
                lib.mopeq_use_isa(isa)
                model(input_ids=PROMPT, past_key_values=cache, use_cache=True)
                lib.mopeq_use_isa(which)
                step = step_of(model, cache)
                assert step is not None
                step(torch.tensor([[3]]), PROMPT.shape[1])
                runs.append(step.stream.x.clone())
        assert all(x.equal(runs[0]) for x in runs)
    finally:
        torch.set_num_threads(threads)
        lib.mopeq_use_isa(isa)


@torch.no_grad()
def test_in_bfloat16_with_linears_as_they_are(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("qwen2_moe")
    source = open_source(folder)
    experts = packing.mixed_map(inventory_of(source, describe(source))).experts
    packing.pack_model(folder, tmp_path / "packed", PrecisionMap(experts, {"attention": FULL, "lm_head": FULL}))
    model = load(tmp_path / "packed", dtype=torch.bfloat16)
    own = DynamicCache(config=model.config)
    model(input_ids=PROMPT, past_key_values=own, use_cache=True)
    step = step_of(model, prefilled(model))
    assert step is not None
    token = torch.tensor([[7]])
    want = model(input_ids=token, past_key_values=own, use_cache=True).logits[:, -1].float()
    exact = load(tmp_path / "packed", dtype=torch.float32)
    cache = DynamicCache(config=model.config)
    exact(input_ids=PROMPT, past_key_values=cache, use_cache=True)
    best = exact(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]
    got = step(token, PROMPT.shape[1]).float()
    assert (got - best).norm() < 1.2 * (want - best).norm()  # no worse than the model in its own type


def test_what_runs_by_itself(model: Any) -> None:
    with torch.no_grad():
        cache = prefilled(model)
        base = body_of(model).model
        assert step_of(model, cache) is not None
        with using("naive"):
            assert step_of(model, cache) is None
        for part in (model, base, base.layers[0].self_attn.q_proj):
            hook = part.register_forward_hook(lambda *args: None)
            assert step_of(model, cache) is None
            hook.remove()
        assert step_of(model, cache) is not None
        block = base.layers[-1].mlp
        for part in (block, block.experts, block.gate):
            hook = part.register_forward_hook(lambda *args: None)
            step = step_of(model, cache)
            assert step is not None
            assert step.layers[-1][1] is block  # as it is, so that the hook runs
            hook.remove()
        assert step_of(model, DynamicCache(config=model.config)) is None
        dense = tiny.tiny_model("olmoe")
        assert step_of(dense, prefilled(dense)) is None
        other = tiny.tiny_model("granitemoe")
        assert step_of(other, prefilled(other)) is None
