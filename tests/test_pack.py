"""Packing a few experts at a time gives what packing all at once gives, and streaming what the whole model gives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import killing
import mopeq.pack as pack_module
from mopeq.analyze import expert_rows, moments
from mopeq.analyze.slab import slabs
from mopeq.checkpoint import verify
from mopeq.errors import InputError
from mopeq.learned import learned
from mopeq.measure import observed, open_model, split_texts
from mopeq.memory import PROCESS, footprint, slab_bytes
from mopeq.pack import pack_experts, pack_model
from mopeq.precision import GROUPS, Precision, PrecisionMap
from mopeq.qtensor import QTensor
from mopeq.quantize import quantize
from mopeq.quantizers import fallback_moments
from mopeq.source import read_group

Make = Callable[..., Path]
MIXED = [Precision(2, 32), Precision(3, 32), Precision(4, 64, True)]


def stored(folder: Path) -> dict[str, Tensor]:
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "llama4_text", "deepseek_v3"])
@pytest.mark.parametrize("cost", ["fisher_error", "output_error"])
def test_streaming_packs_what_the_whole_model_gives(family: str, cost: str, tiny_model: Make, tmp_path: Path) -> None:
    folder, calibration = tiny_model(family), killing.text(tmp_path)
    made = quantize(
        folder, tmp_path / "a", budget="3.2bpw", cost=cost, options=MIXED, calibration=calibration, evaluated=False
    )
    whole = observed(open_model(folder), calibration, texts=split_texts(calibration, folder)[0], gradients=False)
    again = pack_model(whole, made.precisions, tmp_path / "b")
    assert len(made.precisions.histogram()) > 1
    assert same(stored(tmp_path / "a"), stored(tmp_path / "b"))
    assert made.fallbacks == again.fallbacks
    known = quantize(
        folder, tmp_path / "c", precisions=made.precisions, calibration=calibration, evaluated=False, max_memory=2**31
    )
    assert same(stored(tmp_path / "a"), stored(tmp_path / "c"))
    assert known.fallbacks == made.fallbacks


def test_slabs_are_the_layer(tiny_model: Make, tmp_path: Path) -> None:
    ready = observed(open_model(tiny_model("qwen3_moe")), killing.text(tmp_path), gradients=False)
    layer = ready.spec.layers[1]
    seen, module = ready.routed[layer.index], ready.model.get_submodule(layer.module)
    counts = [len(rows) for rows, _ in expert_rows(seen, len(layer.experts))]
    minimum = sorted(counts)[4]  # some fall short, some do not
    weights = {group: read_group(ready.source, layer, group) for group in GROUPS}
    wanted = moments(seen, module, weights["gate_up"])
    for memory in (1, 1 << 30):
        found = list(slabs(ready.source, layer, seen, module, minimum_tokens=minimum, memory=memory))
        assert sorted(e for slab in found for e in slab.experts) == list(range(8))
        assert max(len(slab.experts) for slab in found) == (1 if memory == 1 else 4)
        for group in GROUPS:
            filled, short = fallback_moments(getattr(wanted, group), counts, minimum)
            assert sorted(e for slab in found for e in slab.short[group]) == list(short)
            for slab in found:
                which = list(slab.experts)
                assert torch.equal(slab.weights[group], weights[group][which])
                assert slab.moments is not None
                torch.testing.assert_close(getattr(slab.moments, group), filled[which])
                if not slab.short[group]:
                    assert torch.equal(getattr(slab.moments, group), filled[which])


@pytest.mark.parametrize("method", ["rtn", "rtn-mse", "gptq", "signround"])
def test_the_size_of_slabs_does_not_change_a_bit(
    method: str, tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_module, "learned", partial(learned, iterations=4))
    ready = observed(open_model(tiny_model("olmoe")), killing.text(tmp_path), gradients=False)
    layer = ready.spec.layers[0]
    seen, module = ready.routed[layer.index], ready.model.get_submodule(layer.module)
    row = tuple(MIXED[e % 3] for e in range(8))
    precisions = PrecisionMap(dict.fromkeys(GROUPS, dict.fromkeys(ready.routed, row)))

    def made(memory: int) -> dict[str, QTensor]:
        parts = pack_experts(ready, layer, precisions, method, [], seen, module, memory=memory)
        return {name: q for name, q in parts if isinstance(q, QTensor)}

    one, all_at_once = made(1), made(1 << 30)
    assert len(one) == 24
    for name, q in one.items():
        assert torch.equal(q.qweight, all_at_once[name].qweight)
        assert torch.equal(q.scales, all_at_once[name].scales)


def test_memory_is_kept_or_the_number_is_told(tiny_model: Make, tmp_path: Path) -> None:
    folder = tiny_model("olmoe")
    opened = open_model(folder)
    small = footprint(opened.source, opened.spec)

    def batches(count: int) -> list[dict[str, torch.Tensor]]:
        return [{"input_ids": torch.zeros(100, 1)}] * count

    run = footprint(opened.source, opened.spec, batches(10))
    back = footprint(opened.source, opened.spec, batches(10), gradients=True)
    more = footprint(opened.source, opened.spec, batches(10**5))
    assert PROCESS < small.least < run.least < back.least < more.least
    assert slab_bytes(None, small) == slab_bytes(2**40, small) > slab_bytes(small.least, small)
    with pytest.raises(
        InputError, match=r"is 0\.1 GB and this needs (0\.9\d) GB: .* one packed layer.*; give more$"
    ) as told:
        quantize(folder, tmp_path / "out", uniform=Precision(4, 32), method="rtn", evaluated=False, max_memory=10**8)
    assert list(tmp_path.iterdir()) == []
    number = int(float(str(told.value).partition("needs ")[2].partition(" GB")[0]) * 1e9)
    out = quantize(folder, tmp_path / "out", uniform=Precision(4, 32), method="rtn", evaluated=False, max_memory=number)
    verify(out.path)


def test_what_does_not_fit_is_not_compared(tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mopeq.memory.available_bytes", lambda: 10**8)
    made = quantize(
        tiny_model("olmoe"), tmp_path / "out", uniform=Precision(4, 32), method="rtn",
        calibration=killing.text(tmp_path),
    )  # fmt: skip
    assert made.evaluation is None
    assert made.note.startswith("not compared with the original: both together take 0.6 GB and there are 0.1 GB; ")
    verify(made.path)


def test_a_large_head_is_rounded_some_rows_at_a_time(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_model(tiny_model("olmoe"))
    precisions = PrecisionMap.uniform(opened.inventory.experts, Precision(4, 32), {"lm_head": Precision(4, 32)})
    pack_model(opened, precisions, tmp_path / "whole", method="rtn")
    monkeypatch.setattr(pack_module, "STEP_BYTES", 1000)
    monkeypatch.setattr(pack_module, "ROWS_BYTES", 1000)
    calls: list[int] = []
    real = pack_module.QUANTIZERS["rtn-mse"]
    counted = lambda weight, *rest: (calls.append(weight.shape[1]), real(weight, *rest))[1]  # noqa: E731
    monkeypatch.setitem(pack_module.QUANTIZERS, "rtn-mse", counted)
    pack_model(opened, precisions, tmp_path / "parts", method="rtn")
    assert max(calls) == 1000 // (4 * 64)

    def tensors(name: str) -> dict[str, Tensor]:
        return {k: t for file in (tmp_path / name).glob("*.safetensors") for k, t in load_file(file).items()}

    whole, parts = tensors("whole"), tensors("parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
