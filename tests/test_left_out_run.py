"""0 bits from the command line: measured, allocated, tried, packed, loaded, reported, refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mopeq.checkpoint import read_manifest, verify
from mopeq.cli import main
from mopeq.load import load
from mopeq.precision import LEFT_OUT
from mopeq.stats import read_json

Make = Callable[..., Path]


def words(tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join(chr(97 + (i * j) % 26) * 4 for j in range(600)) for i in range(1, 24)))
    return ["--data", str(text), "--samples", "8", "--length", "32", "--group-size", "32"]


def test_the_whole_way(tiny_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "packed"
    asked = ["quantize", str(tiny_model("olmoe")), "--levels", "0,2,3,4", *words(tmp_path)]
    assert main([*asked, "--budget", "2.2bpw", "-o", str(out)]) == 0, "less than any uniform precision takes"
    said = capsys.readouterr().out
    assert re.search(r"gate_up +0 +[1-9]", said)
    assert "no uniform precision fits 2.2bpw" in said
    verify(out)
    manifest = read_manifest(out)
    gone = manifest.precisions.histogram()[LEFT_OUT] // 2
    assert gone > 0
    assert manifest.inventory.expert_bits(manifest.precisions) <= 2.2
    stats = read_json(out / "mopeq" / "stats.json")["metrics"]
    assert {"fisher_error/gate_up/0", "fisher_error/down/0"} <= stats.keys()
    with torch.no_grad():
        assert torch.isfinite(load(out)(torch.arange(40)[None]).logits).all()
    assert main(["report", str(out)]) == 0
    assert main(["run", str(out), "--prompt", "aaaa", "--max-new-tokens", "4"]) == 0
    guarded = tmp_path / "guarded"
    assert main([*asked, "--budget", "2.9bpw", "--guard", "--refine", "2", "--no-eval", "-o", str(guarded)]) == 0
    told = read_json(guarded / "mopeq" / "run.json")["guard"]
    assert "exchanges taken" in told
    assert "uniform 2g32" in told


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--uniform", "0"], "expected one precision, such as 3"),
        (["--budget", "2.5bpw", "--levels", "0"], "0 bits is the only precision"),
        (["--budget", "0.5bpw", "--levels", "0,2"], "below the smallest map"),
        (["--budget", "3bpw", "--rest", "attention=0"], "only experts can be left out"),
    ],
)
def test_refusals(
    flags: list[str], message: str, tiny_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(tiny_model("olmoe")), "-o", str(tmp_path / "out"), *flags, *words(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
