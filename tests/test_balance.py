"""Calibration sequences chosen by what experts see of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from mopeq.adapters import describe
from mopeq.analyze import expert_tokens, observe
from mopeq.balance import POOL, covering, sequence_tokens
from mopeq.cli import main
from mopeq.data.samples import bundled_images
from mopeq.errors import DataError
from mopeq.load import load_original
from mopeq.measure import Calibration, calibrated, open_model
from mopeq.source import open_source
from mopeq.stats import read_json

Make = Callable[..., Path]
TEXT = [" ".join(chr(97 + (i * j) % 26) * 5 for j in range(400)) for i in range(1, 20)]


def test_missing_tokens_are_covered_and_the_rest_is_in_order() -> None:
    """Coverage is submodular: greedy reaches at least 1 - 1/e of the best choice (Nemhauser et al. 1978)."""
    draw = np.random.default_rng(0)
    for _ in range(20):
        counts = draw.integers(0, 9, (9, 6)) * (draw.random((9, 6)) < 0.4)
        wanted = np.full(6, 12)

        found = covering(counts, wanted, 3)
        covered = {rows: np.minimum(counts[list(rows)].sum(0), wanted).sum() for rows in combinations(range(9), 3)}
        assert covered[tuple(found)] >= (1 - 1 / math.e) * max(covered.values())
        assert found == sorted(set(found))
    counts = np.array([[5, 0], [5, 0], [5, 0], [4, 1]])
    assert covering(counts, np.array([0, 1]), 3) == [0, 1, 3], "one row for the second expert, then the first ones"
    assert covering(counts, np.array([0, 9]), 2) == [0, 3], "what the pool does not have is not waited for"
    assert covering(counts, np.array([9, 9]), 9) == [0, 1, 2, 3]


@pytest.mark.parametrize("family", ["olmoe", "llama4", "deepseek_v3"])
def test_tokens_are_those_of_each_sequence_alone(family: str, tiny_model: Make) -> None:
    source = open_source(tiny_model(family))
    spec = describe(source)
    ids = torch.randint(0, 256, (5, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2, 7:] = 0
    batches = [{"input_ids": ids[i : i + 2], "attention_mask": mask[i : i + 2]} for i in (0, 2, 4)]
    found = sequence_tokens(source, spec, batches, at_once=4)
    model = load_original(source.path)
    for row, (one, length) in enumerate(zip(ids, mask.sum(1).tolist(), strict=True)):
        alone = observe(model, spec, [{"input_ids": one[None, :length]}])
        wanted = torch.cat([expert_tokens(alone[layer.index], len(layer.experts)) for layer in spec.layers])
        assert found[row].tolist() == wanted.tolist()


def test_a_balanced_choice_is_of_the_pool_and_starves_fewer(tiny_model: Make) -> None:
    opened = open_model(tiny_model("qwen3_moe"))
    plain, balanced = (Calibration(samples=8, length=16, batch_size=4, seed=1, balance=share) for share in (0.0, 0.7))
    before, after = (calibrated(opened, asked, texts=TEXT) for asked in (plain, balanced))
    pool = calibrated(opened, Calibration(samples=8 * POOL, length=16, batch_size=4, seed=1), texts=TEXT)
    rows = {tuple(row) for batch in pool.batches for row in batch["input_ids"].tolist()}
    chosen = [tuple(row) for batch in after.batches for row in batch["input_ids"].tolist()]
    assert len(chosen) == len(set(chosen)) == 8
    assert set(chosen) <= rows
    facts = after.info["balance"]
    model = load_original(opened.source.path)
    short = {}
    for name, made in (("short_before", before), ("short_after", after)):
        seen = observe(model, opened.spec, made.batches)
        counts = torch.cat([expert_tokens(seen[layer.index], 8) for layer in opened.spec.layers])
        short[name] = int((counts < facts["least"]).sum())
        assert facts[name.replace("short", "fewest")] == int(counts.min())
    assert facts == {**facts, **short, "pool": 8 * POOL, "taken": 8, "least": math.ceil(0.7 * 8 * 16 * 2 / 8)}
    assert short["short_after"] < short["short_before"]
    assert "balance" not in before.info


def test_what_cannot_be_balanced_is_refused(tiny_model: Make) -> None:
    opened = open_model(tiny_model("olmoe"))
    for share in (-1.0, math.nan, math.inf):
        with pytest.raises(DataError, match="expected the share"):
            calibrated(opened, Calibration(balance=share), texts=TEXT)
    with pytest.raises(DataError, match="conversations with images"):
        calibrated(opened, Calibration(str(bundled_images("calibration.jsonl")), balance=1.0))


def test_the_command_says_what_was_chosen(tiny_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "stats.json"
    text.write_text("\n\n".join(TEXT), encoding="utf-8")
    words = ["analyze", str(tiny_model("olmoe")), "--data", str(text), "--samples", "4", "--length", "16"]
    assert main([*words, "--metrics", "frequency", "--balance", "0.5", "-o", str(out)]) == 0
    assert "4 of 16 sequences chosen: experts with fewer than 8 tokens" in capsys.readouterr().out
    assert read_json(out)["info"]["balance"]["taken"] == 4
