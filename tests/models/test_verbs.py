"""describe, observe, quantize, load and generate on DeepSeek-VL2 and MolmoE with images."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import packing
import tiny
from mopeq import load
from mopeq.adapters import describe
from mopeq.analyze.observe import observe
from mopeq.precision import Precision
from mopeq.quantize import quantize
from mopeq.runtime import packed_modules
from mopeq.source import open_source
from mopeq.stream import Shell, Store, backward
from reference import DEEPSEEK, FOLDER, MOLMOE, NAMES, batch, cases, loaded

names = pytest.mark.parametrize("name", NAMES)
REST = {group: Precision(8, -1) for group in ("attention", "dense_mlp", "shared_experts", "lm_head")}


@pytest.fixture(scope="module", params=NAMES)
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """A fixture quantized from its published folder, and the dense model of the same weights."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    made = quantize(FOLDER / name, folder / "out", uniform=Precision(4, -1), method="rtn", rest=REST, evaluated=False)
    dense = packing.dequantized(FOLDER / name, made.path, folder / "dense")
    return name, made.path, load.load_original(dense, dtype=torch.float32)


def test_packed_models_equal_dequantized_weights(packed: tuple[str, Path, Any]) -> None:
    name, path, dense = packed
    model = load(path, dtype=torch.float32)
    spec = describe(open_source(FOLDER / name))
    assert len(packed_modules(model)) == len(spec.layers) + len(spec.linears)
    for case in ("one_wide", "text_only"):
        inputs = cases(name)[case].inputs
        with torch.no_grad():
            got, want = model(**inputs).logits, dense(**inputs).logits
        assert (got - want).norm() / want.norm() < 1e-5
        assert (want - cases(name)[case].logits).norm() / want.norm() > 0.01  # so that the line above says something


def test_packed_models_generate_from_images(packed: tuple[str, Path, Any]) -> None:
    name, path, dense = packed
    members = ("one_tall", "text_only") if name == MOLMOE else ("one_tall", "two_imgs", "text_only")
    inputs, _ = batch(name, *members)
    model = load(path, dtype=torch.float32)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    assert torch.equal(model.generate(**inputs, **settings), dense.generate(**inputs, **settings))


def test_towers_stay_in_16_bits(packed: tuple[str, Path, Any]) -> None:
    name, path, _ = packed
    stored, original = tiny.tensors(path), tiny.tensors(FOLDER / name)
    towers = {ref.key for ref in describe(open_source(FOLDER / name)).kept if ref.group in ("vision", "projector")}
    assert {key for key in original if key.startswith(("vision.", "projector.", "model.vision_backbone."))} <= (
        towers | {key for key in original if "attn_pool" in key}
    )
    for key in towers:
        assert stored[key].dtype == torch.bfloat16
        assert torch.equal(stored[key], original[key].bfloat16())
    assert not any("attn_pool" in key for key in stored)


def test_saved_again(packed: tuple[str, Path, Any], tmp_path: Path) -> None:
    name, path, _ = packed
    model = load(path, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    assert tiny.tensors(tmp_path / "again").keys() == tiny.tensors(path).keys()
    inputs = cases(name)["one_wide"].inputs
    with torch.no_grad():
        got, want = load(tmp_path / "again")(**inputs).logits, model(**inputs).logits
    assert (got - want).norm() / want.norm() < 1e-5


def images_of(name: str, inputs: Mapping[str, Tensor]) -> Tensor:
    """1 at image tokens; MolmoE's are the start and end of a view, patches and columns."""
    ids = inputs["input_ids"]
    return (torch.isin(ids, torch.arange(361, 365)) if name == MOLMOE else inputs["images_seq_mask"]).long()


@names
def test_text_and_image_tokens_are_told_apart(name: str) -> None:
    model, spec = loaded(name), describe(open_source(FOLDER / name))
    inputs, members = batch(name, "one_wide", "text_only")
    image = images_of(name, inputs)
    routed = observe(model, spec, [{**inputs, "modality": image}], gradients=True)
    for layer in spec.layers:
        seen = routed[layer.index]
        assert seen.vision is not None
        assert seen.gradient is not None
        assert len(seen.hidden) == int(inputs["attention_mask"].sum())
        assert int(seen.vision.sum()) == int(image.sum()) > 30
        assert bool((seen.gradient[seen.vision] != 0).any())
        wanted = members[0].routers.get(layer.index)
        if wanted is not None:
            assert torch.equal(seen.index.sort(-1).values[: len(wanted)], wanted)
    text = observe(model, spec, [members[1].inputs])
    first = spec.layers[0].index
    torch.testing.assert_close(
        routed[first].hidden[-len(text[first].hidden) :], text[first].hidden, rtol=1e-4, atol=1e-4
    )


@names
def test_layer_by_layer_with_images(name: str) -> None:
    """A model of which one layer at a time is in memory sees what the whole one sees; its tower runs once a batch."""
    source = open_source(FOLDER / name)
    data = []
    for names in (("one_wide", "text_only"), ("one_tall",)):
        inputs, _ = batch(name, *names)
        data.append({**inputs, "modality": images_of(name, inputs)})
    spec = describe(source)
    whole = observe(loaded(name), spec, data, gradients=True, seed=1)
    shell, runs = Shell(source, spec), []
    tower = shell.model.get_submodule("model.vision_backbone" if name == MOLMOE else "vision")
    tower.register_forward_pre_hook(lambda module, given: runs.append(len(given[0])))
    for layer, _, seen in backward(shell, data, Store(), seed=1):
        wanted = whole[layer.index]
        assert torch.equal(seen.index, wanted.index)
        torch.testing.assert_close(seen.hidden, wanted.hidden, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen.gradient, wanted.gradient, rtol=1e-3, atol=1e-5)
        assert seen.vision is not None
        assert wanted.vision is not None
        assert torch.equal(seen.vision, wanted.vision)
    assert len(runs) == len(data)


def test_without_an_import_and_without_trust(tmp_path: Path) -> None:
    """A hub folder says where its remote code lies; transformers runs ours and asks nobody."""
    for name in (DEEPSEEK[0], MOLMOE):
        folder = Path(shutil.copytree(FOLDER / name, tmp_path / name))
        tiny.edit_config(folder, auto_map={"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"}, architectures=["X"])
    packed = quantize(
        FOLDER / MOLMOE, tmp_path / "packed", uniform=Precision(4, -1), method="rtn", rest=REST, evaluated=False
    )
    folders = [str(tmp_path / DEEPSEEK[0]), str(tmp_path / MOLMOE), str(packed.path)]
    code = f"""
import json, sys
from transformers import AutoConfig, AutoModelForImageTextToText
assert not any(m.startswith("mopeq.models") for m in sys.modules)
print(json.dumps([type(AutoModelForImageTextToText.from_pretrained(f)).__name__ for f in {folders!r}]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=300
    )
    assert done.returncode == 0, done.stderr
    classes = json.loads(done.stdout.splitlines()[-1])
    assert classes == [type(loaded(name)).__name__ for name in (DEEPSEEK[0], MOLMOE, MOLMOE)]


def test_the_type_is_the_originals_where_nothing_says_it(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER / MOLMOE, tmp_path / "original"))
    tiny.edit_config(folder, torch_dtype=None)
    made = quantize(folder, tmp_path / "out", uniform=Precision(4, -1), method="rtn", rest=REST, evaluated=False)
    assert load(made.path).dtype == torch.float32
