"""Building sets: what is stored, that it is stored once, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sets import CODE, PROSE, calibrated, random_router

from mopeq import moqe
from mopeq.checkpoint import verify
from mopeq.errors import CheckpointError, InputError, ModelError, OutputError
from mopeq.load import load, load_original
from mopeq.moqe.model import open_language
from mopeq.moqe.store import tensor_files
from mopeq.precision import Precision
from mopeq.quantize import quantize
from tiny import edit_config, save_tiny, tensors

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def built(tiny_model: Make, tmp_path_factory: pytest.TempPathFactory) -> moqe.VariantSet:
    tmp = tmp_path_factory.mktemp("built")
    variants = ["rtn-3g32", "same=rtn-3g32", "gptq-3g32", "mixed-3.6"]
    return moqe.build(tiny_model("olmoe"), variants, tmp / "set", calibration=calibrated(tmp))


def test_a_variant_is_what_quantize_makes(built: moqe.VariantSet, tiny_model: Make, tmp_path: Path) -> None:
    alone = quantize(tiny_model("olmoe"), tmp_path / "alone", uniform=Precision(3, 32), method="rtn", evaluated=False)
    want, got = tensors(alone.path), tensors(built.folder("rtn-3g32"))
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        logits = [load(path)(input_ids=ids).logits for path in (alone.path, built.folder("rtn-3g32"))]
    assert torch.equal(*logits)


def test_every_variant_is_a_whole_checkpoint(built: moqe.VariantSet) -> None:
    for name in built.names:
        verify(built.folder(name))
    mixed = verify(built.folder("mixed-3.6"))
    assert 2.5 < mixed.inventory.expert_bits(mixed.precisions) <= 3.6


def test_equal_tensors_are_stored_once_and_the_bytes_are_true(built: moqe.VariantSet) -> None:
    files = [file for name in built.names for file in built.folder(name).glob("*.safetensors")]
    assert built.bytes == sum({os.stat(file).st_ino: os.stat(file).st_size for file in files}.values())
    assert built.separate_bytes == sum(os.stat(file).st_size for file in files)
    by_name = {variant.name: variant for variant in built.variants}
    assert by_name["same"].own_bytes == by_name["rtn-3g32"].own_bytes == 0, "two equal variants have nothing apart"
    assert by_name["gptq-3g32"].own_bytes > 0
    embedding = {tensor_files(built.folder(name))["model.embed_tokens.weight"].stat().st_ino for name in built.names}
    assert len(embedding) == 1
    gptq, rtn = (tensors(built.folder(name)) for name in ("gptq-3g32", "rtn-3g32"))
    own = {key for key, file in tensor_files(built.folder("gptq-3g32")).items() if file.name == "own.safetensors"}
    assert own
    assert not any(torch.equal(gptq[key], rtn[key]) for key in own)


def test_a_variant_survives_the_others(built: moqe.VariantSet, tmp_path: Path) -> None:
    copy = tmp_path / "set"
    shutil.copytree(built.path, copy)
    shutil.rmtree(copy / "variants" / "rtn-3g32")
    verify(copy / "variants" / "gptq-3g32")
    with pytest.raises(CheckpointError, match="variant rtn-3g32 is missing"):
        moqe.read_set(copy)


def test_existing_variants_are_taken(built: moqe.VariantSet, tiny_model: Make, tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    again = moqe.build(model, [f"a={built.folder('rtn-3g32')}", f"b={model}", "rtn-4g32"], tmp_path / "set")
    assert again.names == ("a", "b", "rtn-4g32")
    assert again.calibration == built.calibration, "what other sets' variants were calibrated on is not forgotten"
    opened = open_language(again.path)
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.equal(opened.pool("b")(input_ids=ids).logits, load_original(model)(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("kind", "least", "most"), [("compressed-tensors", 0, 0.05), ("gguf", 0, 0.05), ("awq", 0.05, 0.5)]
)
def test_folders_of_other_quantizers(kind: str, least: float, most: float, tmp_path: Path) -> None:
    from foreign import save_awq, save_compressed, save_gguf, save_llama

    base = save_llama(tmp_path / "base")
    other = {"compressed-tensors": save_compressed, "gguf": save_gguf, "awq": save_awq}[kind](base, tmp_path / "other")
    made = moqe.build(base, [f"full={base}", f"other={other}"], tmp_path / "set")
    random_router(made)
    opened = moqe.load(made.path)
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        got, want = (opened.pool(name)(input_ids=ids).logits for name in ("other", "full"))
    error = (got - want).norm() / want.norm()
    assert least < error < most, "8 bits change the logits a little, 4 more"


def test_a_dense_model_is_quantized_in_its_linear_layers(tmp_path: Path) -> None:
    from foreign import save_llama

    base = save_llama(tmp_path / "base")
    made = moqe.build(base, ["rtn-2g32", "gptq-2g32", "rtn-8g32"], tmp_path / "set", calibration=calibrated(tmp_path))
    for name in made.names:
        manifest = verify(made.folder(name))
        assert {linear.group for linear in manifest.linears.values()} == {"attention", "dense_mlp", "lm_head"}
    opened, original = open_language(made.path), load_original(base, dtype=torch.float32)
    ids = opened.encode(CODE + PROSE)[None]
    with torch.no_grad():
        want = original(input_ids=ids).logits
        error = {name: (opened.pool(name)(input_ids=ids).logits - want).norm() for name in made.names}
    assert 0 < error["rtn-8g32"] < error["gptq-2g32"] < error["rtn-2g32"], "moments of the inputs are used"
    with pytest.raises(InputError, match="mixed is for mixture-of-experts"):
        moqe.build(base, ["rtn-2g32", "mixed-3"], tmp_path / "other", calibration=calibrated(tmp_path))


# -- what is refused


def test_another_model(built: moqe.VariantSet, tiny_model: Make, tmp_path: Path) -> None:
    model, mine = tiny_model("olmoe"), built.folder("rtn-3g32")
    mixtral = quantize(tiny_model("mixtral"), tmp_path / "mix", uniform=Precision(4, 32), method="rtn", evaluated=False)
    for other, said in (
        (tiny_model("qwen3_moe"), "another model"),
        (mixtral.path, "another model"),
        (save_tiny("olmoe", tmp_path / "reseeded", seed=1), "input embedding has other values"),
    ):
        with pytest.raises(ModelError, match="give variants of one model") as error:
            moqe.build(model, [f"a={mine}", f"b={other}"], tmp_path / "set")
        assert said in str(error.value)
        assert not (tmp_path / "set").exists()
        assert not list(tmp_path.glob("*.partial")), "nothing half made is left"


def test_another_tokenizer(built: moqe.VariantSet, tiny_model: Make, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(built.folder("rtn-3g32"), other)
    file = other / "tokenizer.json"
    data = json.loads(file.read_text())
    vocabulary = data["model"]["vocab"]
    a, b = list(vocabulary)[:2]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(data))
    with pytest.raises(ModelError, match="another tokenizer"):
        moqe.build(tiny_model("olmoe"), ["rtn-3g32", f"b={other}"], tmp_path / "set")


def test_what_cannot_be_loaded_here(tiny_model: Make, tmp_path: Path) -> None:
    model, other = tiny_model("olmoe"), tmp_path / "eetq"
    shutil.copytree(model, other)
    edit_config(other, quantization_config={"quant_method": "eetq", "weights": "int8"})
    with pytest.raises(ModelError, match="transformers cannot load") as error:
        moqe.build(model, ["rtn-3g32", f"b={other}"], tmp_path / "set")
    assert "\n" not in str(error.value)


def test_a_damaged_variant(built: moqe.VariantSet, tiny_model: Make, tmp_path: Path) -> None:
    other = tmp_path / "cut"
    shutil.copytree(built.folder("rtn-3g32"), other)
    with next(iter(other.glob("*.safetensors"))).open("r+b") as file:
        file.truncate(200)
    with pytest.raises((CheckpointError, ModelError)):
        moqe.build(tiny_model("olmoe"), ["rtn-3g32", f"b={other}"], tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_the_folder(built: moqe.VariantSet, tiny_model: Make, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists already"):
        moqe.build(tiny_model("olmoe"), ["rtn-3g32", "rtn-4g32"], built.path)
    with pytest.raises(ModelError, match=r"no folder .*; expected a set"):
        moqe.read_set(tmp_path / "none")
    with pytest.raises(ModelError, match=r"has no moqe\.json"):
        moqe.read_set(tiny_model("olmoe"))
    copy = tmp_path / "copy"
    shutil.copytree(built.path, copy)
    (copy / "moqe.json").write_text('{"format": "mopeq-moqe", "version": 1}')
    with pytest.raises(CheckpointError, match="malformed"):
        moqe.read_set(copy)


def test_a_router_of_another_set(built: moqe.VariantSet, tiny_model: Make, tmp_path: Path) -> None:
    other = moqe.build(tiny_model("olmoe"), ["rtn-3g32", "rtn-4g32"], tmp_path / "set")
    with pytest.raises(InputError, match="no router yet"):
        moqe.load(other.path)
    random_router(other)
    copy = tmp_path / "copy"
    shutil.copytree(built.path, copy)
    shutil.copytree(other.path / "router", copy / "router")
    with pytest.raises(InputError, match=f"trained for the set {other.id} of rtn-3g32, rtn-4g32"):
        moqe.load(copy)
    (other.path / "router" / "router.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="is damaged"):
        moqe.load(other.path)
