"""Budgets for a device: the rows against what transformers and the command really do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mopeq.cli import main
from mopeq.errors import BudgetError
from mopeq.fit import PROCESS, activation_bytes, cache_bytes, fit
from mopeq.load import model_config
from mopeq.measure import open_model
from mopeq.precision import DEFAULT_REST
from tiny import FAMILIES, VLM, tiny_model


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(VLM)))
def test_the_cache_is_that_of_transformers(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        cache = model(input_ids=torch.arange(40).view(2, 20), use_cache=True).past_key_values
    layers = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    assert cache_bytes(model.config, 20, 2, 4) == sum(layers) + max(layers)


def test_windows_bound_the_cache() -> None:
    config: Any = tiny_model("gpt_oss").config
    assert config.layer_types == ["sliding_attention", "full_attention"]
    row = 2 * 2 * 16 * 4
    assert cache_bytes(config, 100, 1, 4) == row * (32 + 100) + row * 100


def test_what_grows_with_what(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("olmoe")
    config, model = model_config(folder), open_model(folder).inventory
    small, large = (fit("4GiB", config, model, length, 3, "bfloat16") for length in (64, 128))
    assert small.device == 4 << 30
    assert large.cache == 2 * small.cache
    assert small.weights - large.weights == large.cache - small.cache + large.activations - small.activations
    # one token by hand: 2 rows of 2 I and H in float32; H, and 2 rows of I, in float32, two digits and the numbers of
    # their blocks of 32, three of 4 bytes; then 3 H; then the head
    split = 4 + 2 + 3 * 4 / 32
    experts = 2 * (256 + 64) * 4 + (64 + 2 * 128) * split
    assert activation_bytes(config, model, 1, 1, 2) == experts + 3 * 64 * 2 + 264 * 6


@pytest.mark.parametrize(
    ("device", "context", "says"),
    [("1MB", 64, "leaves nothing"), ("3bpw", 64, "a size such as 8GiB"), ("8GiB", 0, "at least 1")],
)
def test_what_is_refused(device: str, context: int, says: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("olmoe")
    with pytest.raises(BudgetError, match=says):
        fit(device, model_config(folder), open_model(folder).inventory, context, 1, "float32")


def test_quantize_keeps_the_budget(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tiny_model("olmoe"), tmp_path / "packed"
    config, model = model_config(folder), open_model(folder).inventory
    wanted = model.rest_bytes({}) + model.kept_bytes + model.header_bytes + model.expert_parameters * 3 // 8
    device = wanted + PROCESS + cache_bytes(config, 64, 2, 4) + activation_bytes(config, model, 64, 2, 4)
    flags = ["--context", "64", "--batch", "2", "--levels", "2,4", "--samples", "2", "--length", "64", "--no-eval"]
    assert main(["quantize", str(folder), "-o", str(out), "--fit", f"{device}B", *flags, "--json"]) == 0
    printed = capsys.readouterr()
    assert "keys and values" in printed.err
    assert json.loads(printed.out.splitlines()[-1])["bytes"] <= wanted  # progress comes before
    assert sum(file.stat().st_size for file in out.glob("*.safetensors")) > 0.5 * wanted


def test_allocate_fits_as_quantize_does(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, stats, out = tiny_model("olmoe"), tmp_path / "stats.json", tmp_path / "precision.json"
    few = ["--samples", "2", "--length", "64", "--levels", "2,4"]
    assert main(["analyze", str(folder), "--metrics", "fisher_error", *few, "-o", str(stats)]) == 0
    config, model = model_config(folder), open_model(folder).inventory
    made = fit("600MiB", config, model, 64, 2, "float32")
    wanted = model.expert_parameters * 3 // 8 + model.rest_bytes(DEFAULT_REST) + model.kept_bytes + model.header_bytes
    device = f"{made.device - made.weights + wanted}B"
    flags = ["--fit", device, "--context", "64", "--batch", "2", "-o", str(out)]
    capsys.readouterr()
    assert main(["allocate", str(stats), *flags, "--model", str(folder), "--json"]) == 0
    printed = capsys.readouterr()
    assert "keys and values" in printed.err
    note = json.loads(printed.out)["note"]
    assert note["budget"] == f"{wanted}B"
    assert 0.9 * wanted < note["checkpoint_bytes"] <= wanted
    other = tiny_model("mixtral")
    for wrong, says in (
        ([*flags], "no --model"),
        ([*flags, "--model", str(other)], "the statistics are of olmoe"),
        (["--budget", "3bpw", "--context", "64", "-o", str(out)], "belongs to --fit"),
    ):
        assert main(["allocate", str(stats), *wrong]) == 2
        assert says in capsys.readouterr().err
