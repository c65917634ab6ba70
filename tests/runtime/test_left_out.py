"""Experts that are left out: written, loaded, run, saved, refused; against the original with weights dealt out anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from mopeq.checkpoint import verify
from mopeq.errors import CheckpointError, InputError, MapError
from mopeq.export import plan_export
from mopeq.kernels import using
from mopeq.load import load, load_original, load_tokenizer
from mopeq.measure import open_model
from mopeq.precision import FULL, GROUPS, LEFT_OUT, Precision, PrecisionMap
from mopeq.runtime.experts import MixedExperts, without
from mopeq.runtime.generate import generate
from packing import REST, pack_model

Make = Callable[..., Path]


def dealt_out(index: Sequence[int], weights: Sequence[float], gone: set[int]) -> dict[int, float]:
    """The definition, of one token: ``{expert: weight}``."""
    kept = {e: w for e, w in zip(index, weights, strict=True) if e not in gone}
    total, left = sum(weights), sum(kept.values())
    return {e: w * total / left for e, w in kept.items()}


def test_a_tokens_other_experts_get_its_whole_weight() -> None:
    draw = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(8, generator=draw)[:3] for _ in range(50)])
    weights = torch.rand(50, 3, generator=draw, dtype=torch.bfloat16)
    gone = torch.tensor([False, True, False, False, True, True, False, False])
    found_index, found = without(index, weights, gone)
    for row in range(50):
        wanted = dealt_out(index[row].tolist(), weights[row].tolist(), {1, 4, 5})
        got = {e: w for e, w in zip(found_index[row].tolist(), found[row].tolist(), strict=True) if e >= 0}
        assert got == pytest.approx(wanted, rel=1e-5)
    assert (found_index == -1).sum() == torch.isin(index, torch.tensor([1, 4, 5])).sum()
    alone, nothing = without(torch.tensor([[1, 4, -1, 8]]), torch.ones(1, 4), gone)
    assert alone.tolist() == [[-1] * 4]
    assert nothing.tolist() == [[0.0] * 4]


def hooked(model: nn.Module, spec: Any, gone: set[int]) -> nn.Module:
    """The original with the experts' inputs changed token by token."""

    def before(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, index, weights = given
        made = torch.zeros_like(weights)
        for token in range(len(index)):
            kept = dealt_out(index[token].tolist(), weights[token].tolist(), gone)
            made[token] = torch.tensor([kept.get(e, 0.0) for e in index[token].tolist()])
        return hidden, index, made

    for layer in spec.layers:
        model.get_submodule(layer.module).register_forward_pre_hook(before)
    return model


def left_out_map(opened: Any, gone: set[int], precision: Precision = FULL) -> PrecisionMap:
    rows = {
        k: tuple(LEFT_OUT if e in gone else precision for e in range(n)) for k, n in opened.inventory.experts.items()
    }
    return PrecisionMap(dict.fromkeys(GROUPS, rows), {} if precision == FULL else REST)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss", "qwen2_moe"])
@pytest.mark.parametrize("kernel", ["naive", "auto"])
def test_the_original_with_its_weights_dealt_out(family: str, kernel: str, tiny_model: Make, tmp_path: Path) -> None:
    folder, gone = tiny_model(family, dtype=torch.bfloat16), {0, 3}
    opened = open_model(folder)
    made = left_out_map(opened, gone)
    pack_model(folder, tmp_path / "packed", made)
    verify(tmp_path / "packed")
    names = {k.rpartition(".")[0] for k in tiny.tensors(tmp_path / "packed")}
    experts = list(opened.spec.experts())
    wanted = {name for e in experts if e.id.expert not in gone for name in e.names.values()}
    assert names & {n for e in experts for n in e.names.values()} == wanted, "what is left out is not stored"
    ids = torch.randint(0, 256, (2, 21), generator=torch.Generator().manual_seed(1))
    with using(kernel), torch.no_grad():
        small = load(tmp_path / "packed", dtype=torch.float32)
        found = small(ids).logits
        original = hooked(load_original(folder, dtype=torch.float32), opened.spec, gone)
        assert torch.allclose(found, original(ids).logits, atol=2e-3, rtol=1e-3)
        whole = load_original(folder, dtype=torch.float32)(ids).logits
        assert not torch.allclose(found, whole, atol=5e-2)


@pytest.mark.parametrize("precision", [Precision(2, 32), Precision(4, 64, True)])
def test_kernels_agree_and_models_are_saved_again(precision: Precision, tiny_model: Make, tmp_path: Path) -> None:
    folder = tiny_model("olmoe", dtype=torch.bfloat16)
    pack_model(folder, tmp_path / "packed", left_out_map(open_model(folder), {1, 2, 7}, precision))
    ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        with using("naive"):
            slow = load(tmp_path / "packed", dtype=torch.float32)
            wanted = slow(ids).logits
        fast = load(tmp_path / "packed", dtype=torch.float32)
        assert torch.allclose(fast(ids).logits, wanted, atol=2e-3, rtol=1e-3)
        fast.save_pretrained(tmp_path / "again")
        assert torch.equal(load(tmp_path / "again", dtype=torch.float32)(ids).logits, fast(ids).logits)
    first, again = tiny.tensors(tmp_path / "packed"), tiny.tensors(tmp_path / "again")
    assert first.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_decoding_runs_the_module(tiny_model: Make, tmp_path: Path) -> None:
    folder = tiny_model("olmoe", dtype=torch.bfloat16)
    pack_model(folder, tmp_path / "packed", left_out_map(open_model(folder), {0, 5}, Precision(3, 32)))
    model = load(tmp_path / "packed", dtype=torch.float32)
    ids = torch.randint(0, 256, (1, 9), generator=torch.Generator().manual_seed(3))
    wanted = ids
    with torch.no_grad():
        for _ in range(8):
            wanted = torch.cat([wanted, model(wanted).logits[:, -1:].argmax(-1)], 1)
    answer = generate(model, load_tokenizer(folder), ids[0], max_new_tokens=8)
    assert answer.tokens == tuple(wanted[0, 9:].tolist()[: len(answer.tokens)])
    assert answer.tokens


def test_what_cannot_be_left_out_is_refused(tiny_model: Make, tmp_path: Path) -> None:
    folder = tiny_model("olmoe", dtype=torch.bfloat16)
    opened = open_model(folder)
    with pytest.raises(MapError, match="layer 0 keeps 1 experts and gives each token 2"):
        opened.inventory.check(left_out_map(opened, set(range(7))))
    with pytest.raises(MapError, match=r"expert 0\.0 has 0 and 16; 0 bits leaves out a whole expert"):
        PrecisionMap({"gate_up": {0: (LEFT_OUT,)}, "down": {0: (FULL,)}})
    with pytest.raises(MapError, match="only experts can be left out"):
        PrecisionMap.uniform({0: 2}, FULL, {"attention": LEFT_OUT})
    pack_model(folder, tmp_path / "packed", left_out_map(opened, {1}, Precision(4, 32)))
    for kind in ("gguf", "dequantized", "compressed-tensors"):
        with pytest.raises(InputError, match="leaves experts out"):
            plan_export(tmp_path / "packed", kind)
    weighing = tiny_model("llama4_text", dtype=torch.bfloat16)
    pack_model(weighing, tmp_path / "weighing", left_out_map(open_model(weighing), {1}, Precision(4, 32)))
    with pytest.raises(CheckpointError, match="scales the input of its experts"):
        load(tmp_path / "weighing")
    assert not any(isinstance(m, MixedExperts) for m in load_original(folder).modules())
