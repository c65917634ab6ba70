"""Image classifiers: packed convolutions, image folders, sets and their router."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForImageClassification, ConvNextImageProcessorPil

from mopeq import moqe
from mopeq.errors import DataError, InputError, ModelError
from mopeq.moqe.dense import input_moments, patches
from mopeq.moqe.images import read_images
from mopeq.moqe.training import Settings
from mopeq.moqe.vision import (
    build_images,
    classify,
    judge_images,
    load_image_variant,
    load_images,
    train_images,
)
from mopeq.precision import Precision
from mopeq.qtensor import dequantize
from mopeq.quantizers import rtn
from reference_digits import DOMAINS, digits, save_digits, shown, train_resnet


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images, labels = digits()
    return train_resnet(
        tmp_path_factory.mktemp("model") / "resnet", images[:600], labels[:600], epochs=6, sizes=(8, 16)
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    images, labels = digits()
    for number, (part, start) in enumerate((("calibrate", 600), ("learn", 700), ("judge", 850))):
        rows = slice(start, start + 100 + 50 * (part == "learn"))
        for domain in DOMAINS[:2]:
            save_digits(folder / part / domain, shown(images[rows], domain, number), labels[rows])
            save_digits(folder / part / "all", shown(images[rows], domain, number), labels[rows], domain)
    return folder


@pytest.fixture(scope="module")
def built(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> moqe.VariantSet:
    variants = [f"{domain}=gptq-2bit@{data / 'calibrate' / domain}" for domain in DOMAINS[:2]]
    made = build_images(model, [*variants, "rtn-8bit"], tmp_path_factory.mktemp("images") / "set")
    train_images(made.path, data / "learn" / "all", settings=Settings(epochs=3))
    return made


def full(model: Path) -> Any:
    return AutoModelForImageClassification.from_pretrained(model).eval()


def test_patches_are_what_a_convolution_multiplies() -> None:
    for module in (
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.Conv2d(4, 8, 1, 2, bias=False),
        nn.Conv2d(2, 8, 5, dilation=2),
    ):
        x = torch.randn(2, module.in_channels, 13, 11)
        rows = patches(module, x) @ module.weight.flatten(1).T
        want = functional.conv2d(x, module.weight, None, module.stride, module.padding, module.dilation)
        torch.testing.assert_close(
            rows.reshape(2, -1, 8).transpose(1, 2).reshape(want.shape), want, rtol=1e-4, atol=1e-5
        )


def test_moments_give_the_output_s_squares(model: Path) -> None:
    network, pixels = full(model), torch.randn(5, 1, 16, 16)
    name, module = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d) and m.in_channels > 1)
    seen: list[Tensor] = []
    module.register_forward_hook(lambda module, given, out: seen.append(out))
    moments = input_moments(network, [name], [{"pixel_values": pixels}])[name]
    weight = module.weight.detach().flatten(1)
    want = seen[0].transpose(0, 1).flatten(1).square().sum(1)
    torch.testing.assert_close(((weight @ moments) * weight).sum(1), want, rtol=1e-3, atol=1e-3)


def test_a_variant_is_its_packed_weights(built: moqe.VariantSet, model: Path) -> None:
    whole, packed = full(model).state_dict(), load_image_variant(built.folder("rtn-8bit")).state_dict()
    config = json.loads((built.folder("rtn-8bit") / "config.json").read_text())
    names = config["quantization_config"]["weights"]
    assert names
    for key, weight in whole.items():
        if key.removesuffix(".weight") in names:
            flat = weight.flatten(1)
            want = dequantize(rtn(flat[None], Precision(8, -1))[0]).reshape(weight.shape)
            torch.testing.assert_close(packed[key], want)
        else:
            assert torch.equal(packed[key], weight)
    assert built.variants[2].bytes < 0.7 * sum(t.nbytes for t in whole.values())


def test_images_are_prepared_as_transformers_does(tmp_path: Path) -> None:
    settings = {"size": {"shortest_edge": 32}, "crop_pct": 0.875, "resample": 3,
                "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    labels = {"cat": 1, "ant": 0}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet", "label2id": labels}))
    source = np.random.default_rng(0)
    for name, shape in (("cat", (50, 70, 3)), ("ant", (90, 41, 3))):
        (tmp_path / "images" / name).mkdir(parents=True)
        smooth = Image.fromarray(source.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize(shape[1::-1])
        smooth.save(tmp_path / "images" / name / "one.png")
    found = read_images(tmp_path / "images", tmp_path)
    assert found.labels.tolist() == [0, 1], "classes by name, as the model numbers them"
    theirs = ConvNextImageProcessorPil(**settings)
    for pixels, name in zip(found.pixels, ("ant", "cat"), strict=True):
        want = theirs(Image.open(tmp_path / "images" / name / "one.png"), return_tensors="pt")["pixel_values"][0]
        assert pixels.shape == want.shape == (3, 32, 32)
        torch.testing.assert_close(pixels, want, rtol=1e-3, atol=2e-2)


def test_groups_of_a_batch(built: moqe.VariantSet, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = load_images(built.path)
    pixels = read_images(data / "judge" / "all", built.folder("rtn-8bit")).pixels[:40]
    routes = ["plain", "rtn-8bit", "negative", "plain"] * 10
    monkeypatch.setattr(opened, "route", lambda given: routes)
    got = opened.logits(pixels)
    for row, name in enumerate(routes):
        with torch.no_grad():
            want = opened.pool(name)(pixel_values=pixels[row : row + 1]).logits[0]
        torch.testing.assert_close(got[row], want, rtol=1e-4, atol=1e-4)


def test_the_table_and_single_images(built: moqe.VariantSet, data: Path, model: Path) -> None:
    opened = load_images(built.path, resident=2)
    domains = {domain: data / "judge" / domain for domain in DOMAINS[:2]}
    loss, wrong = judge_images(opened, domains, beside={"original": model})
    rows = {row.name: row.loss.value for row in loss.rows["all"]}
    assert rows["original"] == pytest.approx(rows["rtn-8bit"], abs=0.05)
    assert rows["plain"] > rows["original"] + 0.02, "2 bits cost something"
    images = read_images(data / "judge" / "plain", model)
    with torch.no_grad():
        right = (full(model)(pixel_values=images.pixels).logits.argmax(1) == images.labels).float().mean().item()
    assert {row.name: row.loss.value for row in wrong.rows["plain"]}["original"] == pytest.approx(1 - right)
    assert right > 0.5, "the model has learned something"
    assert loss.bytes["routed"] > opened.made.bytes > 0
    found = classify(opened, sorted((data / "judge" / "plain" / "3").iterdir())[:2])
    assert {row.variant for row in found} <= set(opened.made.names)
    assert all(0.1 <= row.probability <= 1 for row in found)


def test_what_is_refused(built: moqe.VariantSet, data: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mixed is for mixture-of-experts"):
        build_images(model, ["rtn-8bit", "mixed-3"], tmp_path / "set")
    with pytest.raises(InputError, match="needs calibration images"):
        build_images(model, ["rtn-8bit", "gptq-4bit"], tmp_path / "set")
    with pytest.raises(DataError, match="calibrated a variant"):
        train_images(built.path, data / "calibrate" / "all")
    with pytest.raises(DataError, match="no folder"):
        read_images(tmp_path / "none", model)
    (tmp_path / "images" / "3").mkdir(parents=True)
    with pytest.raises(DataError, match="1 folders; expected one for each of 10 classes"):
        read_images(tmp_path / "images", model)
    for name in "0123456789":
        (tmp_path / "images" / name).mkdir(exist_ok=True)
    with pytest.raises(DataError, match="has no images"):
        read_images(tmp_path / "images", model)
    (tmp_path / "images" / "3" / "a.png").write_bytes(b"no")
    with pytest.raises(DataError, match="no readable image"):
        read_images(tmp_path / "images", model)
    with pytest.raises(InputError, match="expected language models"):
        moqe.load(built.path)
    torch.manual_seed(1)
    other = full(model)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="of another model"):
        build_images(model, ["rtn-8bit", f"b={tmp_path / 'other'}"], tmp_path / "set")
    assert not (tmp_path / "set").exists()
